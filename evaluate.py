"""Answers about images, benchmarks: runs minigpt4/evaluate.py, which is `minigpt4-evaluate` in an installed package."""

import sys

from minigpt4.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
