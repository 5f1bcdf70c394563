"""Answers about many images: minigpt4/evaluate.py, which an installed package starts as `minigpt4-evaluate`."""

import sys

from minigpt4.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
