"""Fixtures are in fixtures.py, which test_drgrpo.py, one folder up, loads as well."""

pytest_plugins = ["tests.fixtures"]
