"""Run the quickstart: `python -m minigpt4.quickstart`, as `make quickstart` does."""

import sys

from minigpt4.common.cli import run_program
from minigpt4.quickstart.quickstart import main, require_environment

require_environment()
sys.exit(run_program(main))
