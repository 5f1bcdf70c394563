"""Fetch the quickstart's LLM on import (93 MB, once). The shipped checkpoint names this file under `imports`."""

import sys

from minigpt4.quickstart.llm import prepare_llm
from minigpt4.quickstart.prepare import cache_folder

_FOLDER = cache_folder() / "llm"
if not (_FOLDER / "config.json").is_file():
    print(
        f"fetching the quickstart's language model (93 MB, once) into {_FOLDER}",
        file=sys.stderr,
        flush=True,
    )
    prepare_llm(_FOLDER)
