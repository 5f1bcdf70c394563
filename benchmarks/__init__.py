"""Measurements: `python -m benchmarks --help`. Every figure stands beside that of the 2023 way, from the same run."""
