"""What any trainer of this kind needs and none is about. drgrpo.py is the file to read."""
