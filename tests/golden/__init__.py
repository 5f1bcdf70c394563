"""Numbers produced by running the 2023 release; `MINIGPT4_GOLDEN` names another set of the same layout."""

import os
from pathlib import Path

GOLDEN = Path(os.environ.get("MINIGPT4_GOLDEN") or Path(__file__).parent / "data")
