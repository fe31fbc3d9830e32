"""Measurements. `python -m benchmarks.NAME --help`; results go to standard output, or as JSON to a file."""
