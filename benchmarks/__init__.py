"""Measurements of speed and memory: `python -m benchmarks --help`. Figures stand beside the 2023 baseline's of the same run."""
