"""Pools of instruction templates: text files with one template per line, which users can replace.

`{}` in a template is replaced by an annotation's own words or box; the template `{}` is these words alone.
"""

import re

from minigpt4.common.utils import expand_path
from minigpt4.text.segments import IMAGE_SLOT

SLOT = "{}"


def pool_path(pool: str) -> str:
    """Return the path of the file that the project ships for a pool, such as "refer"."""
    return f"prompts/instructions_{pool}.txt"


def read_pool(path: str, takes_words: bool) -> list[str]:
    """Return the templates in a file: its lines that are not blank. Raises OSError, ValueError for an invalid one.

    With `takes_words` each template must have exactly one `{}`, else none.
    """
    try:
        lines = expand_path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' cannot be read ({error}); save it as UTF-8 text") from error
    templates = []
    for number, line in enumerate(lines, 1):
        template = line.strip()
        if not template:
            continue
        if fault := _fault(template, takes_words):
            raise ValueError(f"'{path}' line {number} {fault}: {template!r:.60}")
        templates.append(template)
    if not templates:
        raise ValueError(f"'{path}' has no line; expected one instruction a line")
    return templates


def _fault(template: str, takes_words: bool) -> str | None:
    """Return what is wrong with a template, or None."""
    if template.count(SLOT) != int(takes_words):
        expected = "one, where the words go" if takes_words else "none"
        return f"has {template.count(SLOT)} {SLOT}; expected {expected}"
    if IMAGE_SLOT in template:
        return f"has {IMAGE_SLOT}; the dataset writes the image before the line"
    if re.match(r"\[\w+\]", template):
        return "begins with a task identifier; the dataset writes it"
    return None
