"""Each file here is a command; results are in BENCHMARKS.md."""
