"""The former name of `minigpt4.quickstart`; its commands (`python -m minigpt4.embedded.prepare`) keep working."""

from minigpt4.quickstart import __path__  # noqa: F401
