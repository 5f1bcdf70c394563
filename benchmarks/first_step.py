"""Run train.py for one step and print the seconds of its phases; nothing is imported before it, so imports count too."""

import contextlib
import json
import sys

from minigpt4 import train
from minigpt4.common.startup import startup

AS_2023 = "model.arch=mini_gpt4_loaded_as_2023"

if __name__ == "__main__":
    if AS_2023 in sys.argv:
        from benchmarks import loading_2023  # noqa: F401 (registers the model)
    with contextlib.redirect_stdout(sys.stderr):
        code = train.run_program(
            train.train, train.parse_args(["--cfg-path", sys.argv[1], "--options", *sys.argv[2:]])
        )
    if code:
        sys.exit(code)
    print(json.dumps({"seconds": startup.seconds, "cpu_seconds": startup.cpu_seconds}))
