"""Chat about images: minigpt4/demo.py, which an installed package starts as `minigpt4-demo`."""

import sys

from minigpt4.demo import main

if __name__ == "__main__":
    sys.exit(main())
