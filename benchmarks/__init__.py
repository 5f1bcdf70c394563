"""Measurements of speed and memory: `python -m benchmarks --help`. Each is made beside the 2023 baseline, in one run."""
