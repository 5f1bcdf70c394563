"""YAML files of configurations: read once, within limits of size, with errors that name the key or the line."""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import ConfigError, Problem
from minigpt4.common.utils import first_line

# A configuration is small. A text that is larger, once its aliases are expanded, is a mistake or an attack.
MAX_BYTES, MAX_VALUES = 2**20, 50_000
MAX_DEPTH, MAX_DIGITS = 40, 40
_ADVICE = {  # a part of the parser's message: what to do
    "'\\t'": "a tab stands there, indent with spaces",
    "escape": "a backslash in double quotes begins an escape sequence; write '/', or use single quotes",
    "another document": "one document is read, remove '---'",
    "constructor for the tag": "tags such as !name are not read",
}


def read_yaml(path: str | Path) -> tuple[DictConfig, dict[str, int]]:
    """Return (content, {full key: its line}) of a YAML file. Raises ConfigError, also for keys that are there twice."""
    try:
        text = _read_text(path)
        tree = checked_tree(text)
        lines, duplicates = {}, []
        for key, line in _keys(tree):
            if key in lines:
                message = f"stands twice, in lines {lines[key]} and {line}; keep one of them"
                duplicates.append(Problem(".".join(key), message, Path(path).name))
            lines[key] = line
        if duplicates:
            raise ConfigError(duplicates)
        if tree is not None and not isinstance(tree, yaml.MappingNode):
            raise ValueError("holds no sections; expected env, model, datasets, run")
        # parsed again by OmegaConf's own loader, which reads 1e-4 as a number
        content = OmegaConf.create(text) if tree else OmegaConf.create()
        return content, {".".join(key): line for key, line in lines.items()}
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        reason = _syntax_error(error)
    except OmegaConfBaseException as error:  # of a malformed interpolation or value
        key = getattr(error, "full_key", None)
        reason = f"cannot be used: {f'{key}: ' if key else ''}{first_line(error)}"
    except (ValueError, OverflowError, RecursionError) as error:
        reason = str(error)
    raise ConfigError([Problem("--cfg-path", f"'{path}' {reason}")])


def _read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file. Raises ConfigError or ValueError that says why it cannot be one."""
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
    """Return the tree of a YAML text, None for an empty one. Raises YAMLError, or ValueError for one above the limits."""
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
    """Return (number of values, levels) of a node, with aliases expanded; `known` has those of nodes seen before.

    Raises ValueError for a number of too many digits.
    """
    if id(node) not in known:
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
            line = node.start_mark.line + 1
            raise ValueError(
                f"has a number of {len(node.value):,} digits in line {line}; write a smaller one"
            )
        known[id(node)] = math.inf, 1  # found by an alias within the node itself, which has no end
        size = depth = 0
        for child in _children(node):
            child_size, child_depth = _extent(child, known)
            size, depth = size + child_size, max(depth, child_depth)
        known[id(node)] = 1 + size, 1 + depth
    return known[id(node)]


def _keys(tree: yaml.Node | None) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield (path, line) of every key of all mappings; in a path, items of a list are numbers."""
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
    """Return what is wrong with the syntax, where, and what to do."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}" if mark else f": {first_line(error)}"
    problem = str(getattr(error, "problem", ""))
    advice = [text for part, text in _ADVICE.items() if part in problem]
    advice.append("look at brackets, quotes, indentation")
    return f"is not valid YAML{place}; {advice[0]}"
