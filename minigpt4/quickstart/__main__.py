"""`python -m minigpt4.quickstart`, what `make quickstart` runs."""

from minigpt4.quickstart.quickstart import main, require_environment

require_environment()
main()
