"""The prompts of the benchmarks, versioned in prompts.txt, so that a result can say which one was used."""

import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("prompts.txt")
SLOT = "{question}"
NAME = re.compile(r"[\w-]*(/\d+)?", re.ASCII)  # what can only be meant as a name


class Prompt(NamedTuple):
    """`name` is name/version, or "own" for the user's own text."""

    name: str
    text: str

    def ask(self, question: str = "") -> str:
        """Return the prompt with the question in its slot."""
        return self.text.replace(SLOT, question)


@cache
def shipped_prompts() -> dict[str, Prompt]:
    """Return the prompts of prompts.txt by name/version, and the latest version of each also by its bare name."""
    prompts = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, text = line.split(": ", 1)
            # Versions are in ascending order, so the latest overwrites the others under the bare name.
            prompts[name] = prompts[name.partition("/")[0]] = Prompt(name, text)
    return prompts


def find_prompt(name_or_text: str, takes_question: bool) -> Prompt:
    """Return a shipped prompt by name, or the user's own text, which is anything that is no single word (see NAME).

    Raises ValueError for an unknown name, and for a prompt that has a {question} slot but no question to ask, or the
    other way round.
    """
    known = shipped_prompts()
    if name_or_text in known:
        prompt = known[name_or_text]
    elif not NAME.fullmatch(name_or_text.strip()):
        prompt = Prompt("own", name_or_text)
    else:
        close = get_close_matches(name_or_text, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}."
        raise ValueError(
            f"prompt: unknown name '{name_or_text}'; {hint} A text of your own is more than one word"
        )
    if takes_question and SLOT not in prompt.text:
        raise ValueError(
            f"prompt: '{prompt.text}' has no {SLOT}, but this benchmark asks a question about each image"
        )
    if not takes_question and SLOT in prompt.text:
        raise ValueError(f"prompt: '{prompt.text}' has {SLOT}, but this benchmark has no questions")
    return prompt
