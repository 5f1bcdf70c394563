"""train.py with a task of a user's own, registered as users do, that has a user's mistake in it.

python tests/survival/weighted_task.py --cfg-path ... with `run.task: by_length`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minigpt4 import train
from minigpt4.common.cli import run_program
from minigpt4.common.registry import registry
from minigpt4.tasks import BaseTask


@registry.register_task("by_length")
class ByLengthTask(BaseTask):
    """Short captions weigh more; the weight of a single word is infinite."""

    def train_step(self, model, samples: dict):
        loss = super().train_step(model, samples)
        blanks = [text.count(" ") for text in samples["text_input"]]
        return loss / loss.new_tensor(blanks).mean()


if __name__ == "__main__":
    sys.exit(run_program(train.train, train.parse_args()))
