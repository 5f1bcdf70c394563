"""Train the model of a YAML file: runs minigpt4/train.py, which is `minigpt4-train` in an installed package."""

import sys

from minigpt4.train import main

if __name__ == "__main__":
    sys.exit(main())
