"""Runners, found by `run.runner`. Add yours to the imports and to __all__."""

from minigpt4.runners.runner_base import RunnerBase

__all__ = ["RunnerBase"]
