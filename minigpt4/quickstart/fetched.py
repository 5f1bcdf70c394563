"""Named by `imports` of the shipped checkpoint: whoever opens it has its LLM, which is fetched once (93 MB)."""

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
