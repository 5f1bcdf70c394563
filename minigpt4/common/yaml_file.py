"""A YAML file as a configuration: its text is read once, and what is wrong with it is said by key and line."""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import ConfigError, Problem

# A configuration is small; a text that is not, once its aliases are filled in, is a mistake or an attack.
MAX_BYTES, MAX_VALUES = 2**20, 50_000
MAX_DEPTH, MAX_DIGITS = 40, 40
_ADVICE = {  # what the parser says contains -> what to do
    "'\\t'": "a tab stands there, indent with spaces",
    "escape": "a backslash in double quotes begins a sign; write '/', or use single quotes",
    "another document": "one document is read, remove '---'",
    "constructor for the tag": "tags such as !name are not read",
}


def read_yaml(path: str | Path) -> tuple[DictConfig, dict[str, int]]:
    """Return (what a YAML file says, {full key: its line}). Raises ConfigError, of every key that stands twice."""
    try:
        text = _read_text(path)
        tree = checked_tree(text)
        lines, twice = {}, []
        for key, line in _keys(tree):
            if key in lines:
                where = f"stands twice, in lines {lines[key]} and {line}; keep one of them"
                twice.append(Problem(".".join(key), where, Path(path).name))
            lines[key] = line
        if twice:
            raise ConfigError(twice)
        if tree is not None and not isinstance(tree, yaml.MappingNode):
            raise ValueError("holds no sections; expected env, model, datasets, run")
        # OmegaConf's own loader reads 1e-4 as a number
        return OmegaConf.create(text) if tree else OmegaConf.create(), {
            ".".join(key): lines[key] for key in lines
        }
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        reason = _syntax_error(error)
    except OmegaConfBaseException as error:  # of an interpolation, or a value that is none
        message = str(error).splitlines()[0]
        reason = f"cannot be used: {f'{error.full_key}: ' if getattr(error, 'full_key', None) else ''}{message}"
    except (ValueError, OverflowError, RecursionError) as error:
        reason = str(error)
    raise ConfigError([Problem("--cfg-path", f"'{path}' {reason}")])


def _read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([Problem("--cfg-path", f"no file at '{path}'")]) from None
    except IsADirectoryError:
        raise ValueError("is a folder; give a YAML file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("is UTF-16 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; give a YAML file") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES // 2**20} MiB; give a YAML file of settings")
    return text


def checked_tree(text: str) -> yaml.Node | None:
    """Return the tree of a YAML text, None of an empty one. Raises YAMLError, or ValueError for one without bounds."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep") from None
    size, depth = _extent(tree, {}) if tree else (0, 0)
    if size > MAX_VALUES:
        raise ValueError(f"holds more than {MAX_VALUES:,} values, once its aliases are filled in")
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
    return tree


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return list(chain.from_iterable(node.value))
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _extent(node: yaml.Node, known: dict[int, tuple[float, int]]) -> tuple[float, int]:
    """Return (values below a node, aliases filled in; levels). Raises ValueError for a number of very many digits."""
    if id(node) not in known:
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            line = node.start_mark.line + 1
            raise ValueError(
                f"has a number of {len(node.value):,} digits in line {line}; write a smaller one"
            )
        known[id(node)] = math.inf, 1  # an alias to what holds it has no end
        extents = [_extent(child, known) for child in _children(node)]
        known[id(node)] = (
            1 + sum(size for size, _ in extents),
            1 + max((depth for _, depth in extents), default=0),
        )
    return known[id(node)]


def _keys(tree: yaml.Node | None) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (path of a key, its line) of all mappings, as they stand in the text; items of a list have numbers."""
    nodes = [((), tree)]
    while nodes:
        where, node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += [((*where, str(index)), item) for index, item in enumerate(node.value)]
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            path = (*where, str(key.value))
            yield path, key.start_mark.line + 1
            nodes.append((path, value))


def _syntax_error(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}" if mark else f": {str(error).splitlines()[0]}"
    problem = str(getattr(error, "problem", ""))
    advice = next(
        (text for sign, text in _ADVICE.items() if sign in problem),
        "look at brackets, quotes, indentation",
    )
    return f"is not valid YAML{place}; {advice}"
