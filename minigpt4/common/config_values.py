"""Plain values of YAML files and `--options`, converted to the types that a dataclass declares."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import Report
from minigpt4.common.utils import first_line, without_secrets
from minigpt4.common.yaml_file import checked_tree

PLACEHOLDER = "/path/to/"


def apply_options(user: DictConfig, options: Sequence[str] | None, report: Report) -> None:
    """Set `--options`, items `key=value` or pairs `key value`, in the user's configuration."""
    options = list(options or ())
    # the first item decides which of the two spellings all of them have
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
        if not all(key.split(".")):
            report.add("--options", f"'{key}' is no key; write every item as SECTION.KEY=VALUE")
            continue
        report.places[key] = "--options"
        try:
            value = _option_value(text)
            OmegaConf.update(user, key, value, merge=isinstance(value, dict), force_add=True)
        except (
            OmegaConfBaseException,
            yaml.YAMLError,
            ValueError,
            TypeError,
            LookupError,
        ) as error:
            report.add("--options", f"cannot set '{key}': {first_line(error)}")


def _option_value(text: str) -> Any:
    """Return the value of an option, parsed as YAML except that an unquoted `#` does not begin a comment."""
    if "#" in text and not text.startswith(("'", '"', "[", "{")):
        return text
    checked_tree(text)
    if not text:
        return ""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain settings `below` overridden by those of `above`; mappings are merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        are_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlaid(merged[key], value) if are_mappings else value
    return merged


def typed(section: Mapping[str, Any], schema: type, where: str, report: Report) -> DictConfig:
    """Return plain settings as a structured config of the dataclass `schema`; report keys and values that do not fit."""
    config = OmegaConf.structured(schema)
    hints = typing.get_type_hints(schema)
    dead = getattr(schema, "DEAD_KEYS", {})
    for key, value in section.items():
        path = f"{where}.{key}"
        if key in dead:
            report.warnings.append(f"{path}: this key does nothing: {dead[key]}")
            continue
        if key not in hints:
            report.unknown(path, "key", hints)
            continue
        # nested sections are checked by their own dataclass
        kind = _not_optional(hints[key])
        if dataclasses.is_dataclass(kind) and isinstance(value, dict):
            value = typed(value, kind, path, report)
        if kind is float and type(value) is int:  # OmegaConf rejects 1 for 1.0
            value = float(value)
        if type(value) in (int, float) and not -(2**63) < value < 2**63:  # or nan
            report.add(path, f"{value} is out of range")
            continue
        try:
            # converts to the type, e.g. 3 to "3", where an assignment would warn
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            found = "null" if value is None else f"{value!r} ({type(value).__name__})"
            report.add(path, f"{found} is not {_describe(hints[key])}")
    return config


def check_values(node: DictConfig | ListConfig, where: str, report: Report) -> None:
    """Report unset keys, placeholder paths and broken interpolations in a section or a list."""
    for key in range(len(node)) if isinstance(node, ListConfig) else node:
        path = f"{where}.{key}"
        if OmegaConf.is_missing(node, key):
            if report.is_clean(path):  # else it is set, to a value that is reported already
                report.add(path, "missing; it has no default")
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            if report.is_clean(path):
                report.add(path, first_line(error))
            continue
        if OmegaConf.is_config(value):
            check_values(value, path, report)
        elif isinstance(value, str) and PLACEHOLDER in value:
            message = f"'{value}' is the placeholder of the shipped file; set it to your own path"
            report.add(path, message, is_content=True)


def _not_optional(hint: Any) -> Any:
    """Return X of the type hint `X | None`, any other hint as it is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _describe(hint: Any) -> str:
    """Return the values that a type hint allows, in words: "an integer or null"."""
    kind = _not_optional(hint)
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    name = "list" if typing.get_origin(kind) is list else getattr(kind, "__name__", str(kind))
    words = {"int": "an integer", "str": "text"}.get(name, f"a {name}")
    return words if kind is hint else f"{words} or null"


def hide_secrets(node: Any) -> Any:
    """Return containers whose URLs are shown by `without_secrets`."""
    if isinstance(node, dict):
        return {key: hide_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [hide_secrets(value) for value in node]
    return without_secrets(node) if isinstance(node, str) else node
