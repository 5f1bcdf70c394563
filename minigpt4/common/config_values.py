"""From YAML files and `--options` to values of the types that a dataclass declares."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import ConfigError, Problem, Report
from minigpt4.common.utils import without_secrets

SECTIONS = ("env", "model", "datasets", "run")


def load_yaml(path: str | Path) -> DictConfig:
    """Return a YAML file. Raises ConfigError if it is absent, no YAML, or no mapping."""
    try:
        loaded = OmegaConf.load(path)
        if isinstance(loaded, DictConfig):
            return loaded
        reason = f"'{path}' holds no sections; expected {', '.join(SECTIONS)}"
    except FileNotFoundError:
        reason = f"no file at '{path}'"
    except IsADirectoryError:
        reason = f"'{path}' is a folder; give a YAML file"
    except UnicodeDecodeError:
        reason = f"'{path}' is not UTF-8 text; give a YAML file"
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else f": {str(error).splitlines()[0]}"
        reason = f"'{path}' is not valid YAML{place}; look at brackets, quotes, indentation"
    raise ConfigError([Problem("--cfg-path", reason)])


def apply_options(user: DictConfig, options: Sequence[str] | None, report: Report) -> None:
    """Overlay `--options`, items `key=value` or pairs `key value`, on the user's configuration."""
    options = list(options or ())
    # the first item says which of the two spellings it is
    if options and "=" in options[0]:
        for item in options:
            if "=" not in item:
                report.add("--options", f"'{item}' has no '='; write every item as KEY=VALUE")
        pairs = [item.split("=", 1) for item in options if "=" in item]
    else:
        if len(options) % 2:
            report.add("--options", f"'{options[-1]}' has no value; write {options[-1]}=VALUE")
        pairs = list(zip(options[::2], options[1::2], strict=False))
    for key, text in pairs:
        report.places[key] = "--options"
        try:
            value = _option_value(text)
            OmegaConf.update(user, key, value, merge=isinstance(value, dict), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            report.add("--options", f"cannot set '{key}': {str(error).splitlines()[0]}")


def _option_value(text: str) -> Any:
    """Return the value of an option as YAML reads it, but an unquoted `#` begins no comment."""
    if "#" in text and not text.startswith(("'", '"', "[", "{")):
        return text
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"] if text else ""


def typed(section: DictConfig, schema: type, where: str, report: Report) -> DictConfig:
    """Return `section` as a structured config of a dataclass; keys that do not fit are reported."""
    config = OmegaConf.structured(schema)
    hints = typing.get_type_hints(schema)
    dead = getattr(schema, "DEAD_KEYS", {})
    for key, value in OmegaConf.to_container(section, resolve=False).items():
        path = f"{where}.{key}"
        if key in dead:
            report.warnings.append(f"{path}: this key does nothing: {dead[key]}")
            continue
        if key not in hints:
            report.unknown(path, "key", hints)
            continue
        kind = _not_optional(hints[key])
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = typed(OmegaConf.create(value), kind, path, report)
        if kind is float and type(value) is int:  # OmegaConf takes no 1 for 1.0
            value = float(value)
        try:
            config[key] = value
        except OmegaConfBaseException:
            found = "null" if value is None else f"{value!r} ({type(value).__name__})"
            report.add(path, f"{found} is not {_describe(hints[key])}")
    return config


def _not_optional(hint: Any) -> Any:
    """Return X of the type hint `X | None`, any other hint as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _describe(hint: Any) -> str:
    kind = _not_optional(hint)
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    name = "list" if typing.get_origin(kind) is list else getattr(kind, "__name__", str(kind))
    words = {"int": "an integer", "str": "text"}.get(name, f"a {name}")
    return words if kind is hint else f"{words} or null"


def hide_secrets(node: Any) -> Any:
    """Return containers whose addresses lack user, password and query; `${..}` stays as it is."""
    if isinstance(node, dict):
        return {key: hide_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [hide_secrets(value) for value in node]
    is_address = isinstance(node, str) and node.startswith("http") and "${" not in node
    return without_secrets(node) if is_address else node
