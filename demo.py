"""Chat about images: runs minigpt4/demo.py, which is `minigpt4-demo` in an installed package."""

import sys

from minigpt4.demo import main

if __name__ == "__main__":
    sys.exit(main())
