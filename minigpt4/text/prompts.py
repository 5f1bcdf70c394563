"""The prompt file of `model.prompt_path`: lines with one `<ImageHere>` each, put into `model.prompt_template`."""

from minigpt4.common.config import Problem
from minigpt4.common.utils import expand_path
from minigpt4.text.segments import IMAGE_SLOT


def read_prompts(path: str, template: str, where: str = "model") -> list[str]:
    """Return the prompts of a file, put into `template`; lines without an image slot are dropped.

    Raises ValueError or FileNotFoundError if any of them cannot be used.
    """
    if problems := prompt_problems(path, template, where):
        error = ValueError if expand_path(path).is_file() else FileNotFoundError
        raise error("\n".join(map(str, problems)))
    return [template.replace("{}", line) for _, line in _lines(path)]


def prompt_problems(path: str, template: str, where: str = "model") -> list[Problem]:
    """Return what is wrong with the prompt file, if `path` is not empty, and with the template."""
    key = f"{where}.prompt_path"
    if path and not expand_path(path).is_file():
        hint = "paths start from the current folder, or that of the YAML file"
        return [Problem(key, f"no file at '{expand_path(path)}'; {hint}")]
    if (path or template) and (count := template.count("{}")) != 1:
        expected = "expected exactly one, where the prompt goes"
        return [Problem(f"{where}.prompt_template", f"{template!r} has {count} {{}}; {expected}")]
    if not path:
        return []
    try:
        lines = _lines(path)
    except UnicodeDecodeError as error:
        return [Problem(key, f"'{path}' cannot be read ({error}); save it as UTF-8 text")]
    if not lines:
        return [
            Problem(key, f"no line of '{path}' has {IMAGE_SLOT}; every prompt needs exactly one")
        ]
    problems = []
    for number, line in lines:
        if problem := _problem(template.replace("{}", line)):
            problems.append(Problem(key, f"'{path}' line {number} {problem}"))
    return problems


def _problem(prompt: str) -> str | None:
    """Return what is wrong with one prompt, None if it can be used."""
    pieces = prompt.split(IMAGE_SLOT)
    if len(pieces) != 2:
        return f"has {len(pieces) - 1} {IMAGE_SLOT}; every prompt needs exactly one"
    if not all(pieces):
        side = "before" if not pieces[0] else "after"
        return f"has no text {side} {IMAGE_SLOT}; write some, e.g. <Img>{IMAGE_SLOT}</Img>"
    return None


def _lines(path: str) -> list[tuple[int, str]]:
    """Return (number from 1, line) of the lines that have an image slot."""
    text = expand_path(path).read_text(encoding="utf-8-sig")
    return [
        (number, line) for number, line in enumerate(text.splitlines(), 1) if IMAGE_SLOT in line
    ]
