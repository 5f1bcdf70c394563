"""Train by a YAML file: minigpt4/train.py, which an installed package starts as `minigpt4-train`."""

import sys

from minigpt4.train import main

if __name__ == "__main__":
    sys.exit(main())
