"""The sentences that stand around an annotation's own words: a file of them, a line each, of which users write more.

`{}` in a line is the place of the words or the box; the line `{}` alone asks by them without a sentence.
"""

import re

from minigpt4.common.utils import expand_path
from minigpt4.text.segments import IMAGE_SLOT

SLOT = "{}"


def pool_path(pool: str) -> str:
    """Return the file that the project ships for a pool, such as "refer"."""
    return f"prompts/instructions_{pool}.txt"


def read_pool(path: str, takes_words: bool) -> list[str]:
    """Return the lines of a pool that are not blank. Raises OSError, ValueError for one that does not fit.

    With `takes_words` each line has one `{}`, else none.
    """
    try:
        lines = expand_path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' cannot be read ({error}); save it as UTF-8 text") from error
    sentences = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and (fault := _fault(line, takes_words)):
            raise ValueError(f"'{path}' line {number} {fault}: {line!r:.60}")
        sentences += [line] if line else []
    if not sentences:
        raise ValueError(f"'{path}' has no line; expected one instruction a line")
    return sentences


def _fault(line: str, takes_words: bool) -> str | None:
    """Return what is wrong with a line, or nothing."""
    if line.count(SLOT) != takes_words:
        return f"has {line.count(SLOT)} {SLOT}; expected {'one, where the words go' if takes_words else 'none'}"
    if IMAGE_SLOT in line:
        return f"has {IMAGE_SLOT}; the dataset writes the image before the line"
    if re.match(r"\[\w+\]", line):
        return "begins with a task identifier; the dataset writes it"
    return None
