"""Training prompts: lines of a file, each with one place for the picture, set into a template."""

from minigpt4.common.utils import expand_path

IMAGE_SLOT = "<ImageHere>"


def read_prompts(path, template, where="model"):
    """Return the list of prompts of a file, set into `template`; lines without an image slot are dropped.

    Raises ValueError or FileNotFoundError if any of them could not be used.
    """
    problems = prompt_problems(path, template, where)
    if problems:
        error = ValueError if expand_path(path).is_file() else FileNotFoundError
        raise error("\n".join(problems))
    return [template.replace("{}", line) for _, line in _lines(path)]


def instruction_prompt(template, instruction):
    """Return the prompt that asks `instruction` about one picture, as a chat would, set into `template`."""
    return template.replace("{}", f"<Img>{IMAGE_SLOT}</Img> {instruction}")


def prompt_problems(path, template, where="model"):
    """Return what is wrong with prompt file and template, as lines that begin with the key; none without a file."""
    if not path:
        return []
    if not expand_path(path).is_file():
        return [f"{where}.prompt_path: no file at '{expand_path(path)}'; paths are relative to the current folder"]
    if template.count("{}") != 1:
        return [
            f"{where}.prompt_template: {template!r} has {template.count('{}')} {{}}; expected exactly one, where the "
            "prompt goes"
        ]
    lines = _lines(path)
    if not lines:
        return [f"{where}.prompt_path: no line of '{path}' has {IMAGE_SLOT}; every prompt needs exactly one"]
    return [
        f"{where}.prompt_path: '{path}' line {number} {problem}"
        for number, line in lines
        if (problem := _problem(template.replace("{}", line)))
    ]


def _problem(prompt):
    """Return what is wrong with one prompt, or nothing."""
    pieces = prompt.split(IMAGE_SLOT)
    if len(pieces) != 2:
        return f"has {len(pieces) - 1} {IMAGE_SLOT}; every prompt needs exactly one"
    if not all(pieces):
        side = "before" if not pieces[0] else "after"
        return f"has no text {side} {IMAGE_SLOT}; write some, e.g. <Img>{IMAGE_SLOT}</Img>"
    return None


def _lines(path):
    """Return (number from 1, line) of the lines that have an image slot."""
    text = expand_path(path).read_text(encoding="utf-8")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if IMAGE_SLOT in line]
