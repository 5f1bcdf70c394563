"""YAML files and `--options` -> one typed, checked `Config`. The only place that merges and checks configurations.

Precedence, weakest first: the defaults of the registered class (its dataclass `Config`), the YAML shipped for its
type, the user's YAML, `--options`. Every problem of all sections is collected and reported at once, with the full
key, the line of the user's file, and what was expected. Values stay unresolved in what is printed and saved, so that
`${oc.env:TOKEN}` never ends up in a log or a checkpoint.
"""

import dataclasses
import json
import logging
import types
import typing
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.registry import RegistryError, registry
from minigpt4.common.utils import without_secrets

REQUIRED = "???"  # default of a key that has none (OmegaConf's marker)
PLACEHOLDER = "/path/to/"
PACKAGE_DIR = Path(__file__).resolve().parents[1]
SECTIONS = ("env", "model", "datasets", "run")
_DEAD_SECTIONS = ("preprocess", "evaluation_datasets")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with one key of a configuration, such as `datasets.laion.build_info.storage`."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ConfigError(ValueError):
    """All problems found in a configuration; `problems` holds them line by line."""

    def __init__(self, problems):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{count} in the configuration:", *(f"  {line}" for line in self.problems)]))


def add_config_arguments(parser):
    """Give an argparse parser the two options that every program shares."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="configuration file")
    parser.add_argument(
        "--options",
        nargs="+",
        metavar="KEY=VALUE",
        help="override settings of the file, e.g. run.max_epoch=2 model.ckpt=out/checkpoint_3.pth "
        "(or pairs: run.max_epoch 2)",
    )


@dataclasses.dataclass
class EnvConfig:
    """Settings of the machine. `cache_root`: everything downloaded or prepared goes below this folder."""

    cache_root: str = REQUIRED


def load_environment():
    """Return the shipped `env` section."""
    return _load_yaml(PACKAGE_DIR / "configs/default.yaml").env


class Config:
    """A checked configuration: `model_cfg`, `datasets_cfg`, `run_cfg`, `env_cfg` are typed OmegaConf sections.

    `args` has `cfg_path` and `options` (as `add_config_arguments` parses them). With `for_training` the sections
    that training needs must be there, and their files, folders, shards and devices too. Nothing heavy is loaded.
    Raises ConfigError with every problem found. What a key of the patterns `unopened` names need not be there: the
    program does not open it, and finds what is wrong with it in `report.unopened`.
    """

    def __init__(self, args, for_training=False, unopened=()):
        self.report = _Report(unopened)
        user = _load_yaml(args.cfg_path)
        self.report.locate(args.cfg_path)
        _apply_options(user, getattr(args, "options", None), self.report)
        self._check_roots(user, for_training)
        env = OmegaConf.merge(load_environment(), user.get("env") or {})
        self.config = OmegaConf.create({"env": _typed(env, EnvConfig, "env", self.report)})
        self.config.model = self._model(user.get("model") or OmegaConf.create())
        self.config.datasets = {
            name: self._dataset(name, section or OmegaConf.create())
            for name, section in (user.get("datasets") or {}).items()
        }
        self.config.run = self._run(user.get("run") or OmegaConf.create())
        for root in SECTIONS if for_training else ("env", "model"):  # an answer needs no data: its paths may be unset
            self._check_values(self.config[root], root)
        self._preflight(for_training)
        if self.report.problems:
            raise ConfigError([*self.report.problems, *self.report.unopened.values()])

    model_cfg = property(lambda self: self.config.model)
    datasets_cfg = property(lambda self: self.config.datasets)
    run_cfg = property(lambda self: self.config.run)
    env_cfg = property(lambda self: self.config.env)

    def to_dict(self):
        """Return the merged configuration as plain containers to be shown and saved.

        Interpolations are unresolved; addresses that have none are without user, password and query.
        """
        return _without_secrets(OmegaConf.to_container(self.config, resolve=False))

    def pretty_print(self, log=logging.info):
        """Log the sections, unresolved, in the 2023 layout; warn of keys that do nothing any more."""
        for warning in self.report.warnings:
            logging.warning(warning)
        plain = self.to_dict()
        log("\n=====  Running Parameters    =====\n%s", json.dumps(plain["run"], indent=4, sort_keys=True))
        log("\n======  Dataset Attributes  ======")
        for name, section in plain["datasets"].items():
            log("\n======== %s =======\n%s", name, json.dumps(section, indent=4, sort_keys=True))
        log("\n======  Model Attributes  ======\n%s", json.dumps(plain["model"], indent=4, sort_keys=True))

    def _preflight(self, for_training):
        """Let the classes of the sections that read well look for files, folders, shards and devices."""
        sections = [("model", "model", self.model_cfg.get("arch"), self.model_cfg)]
        if for_training:
            sections += [
                ("builder", f"datasets.{name}", cfg.get("builder") or name, cfg)
                for name, cfg in self.datasets_cfg.items()
            ]
            sections += [("runner", "run", self.run_cfg.get("runner"), self.run_cfg)]
        for kind, where, name, section in sections:
            if not any(line.startswith(where) for line in self.report.problems):
                for line in registry.get(kind, name).preflight(section, where):
                    self.report.add_line(str(line), is_content=True)

    def _check_roots(self, user, for_training):
        for root in user:
            if root in _DEAD_SECTIONS:
                self.report.warnings.append(f"{root}: this section does nothing")
            elif root not in SECTIONS:
                self.report.unknown(str(root), "section", SECTIONS)
        needed = ("model", "datasets", "run") if for_training else ("model",)
        for root in needed[1:]:  # without `model` the report asks for model.arch
            if not user.get(root):
                self.report.add(root, f"this section is missing; a configuration needs {', '.join(needed)}")

    def _model(self, user):
        arch, model_type = user.get("arch"), user.get("model_type")
        if not arch:
            self.report.add("model.arch", f"missing; known: {', '.join(registry.list_models())}")
            return user
        cls = self._class("model", arch, "model.arch")
        if cls is None:
            return user
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        if model_type not in known:
            self.report.unknown("model.model_type", f"type {model_type!r} of {arch}", known, guess=str(model_type))
            return user
        merged = OmegaConf.merge(_load_yaml(PACKAGE_DIR / known[model_type]).model, user)
        return _typed(merged, cls.Config, "model", self.report)

    def _dataset(self, section, user):
        """Return the typed section; its key `builder` names the class, without it the section's own name does."""
        where = f"datasets.{section}"
        name = user.get("builder") or section
        if "builder" in user:
            cls = self._class("builder", name, f"{where}.builder")
        else:
            cls = self._class("builder", name, where, f"; a section of any other name needs the key {where}.builder")
        if cls is None:
            return user
        kind = user.get("type", "default")
        known = cls.DATASET_CONFIG_DICT
        if kind not in known:
            self.report.unknown(f"{where}.type", f"type {kind!r} of {name}", known, guess=str(kind))
            return user
        merged = OmegaConf.merge(_load_yaml(PACKAGE_DIR / known[kind]).datasets[name], user)
        typed = _typed(merged, cls.Config, where, self.report)
        for role in ("vis_processor", "text_processor"):
            for split, settings in (typed.get(role) or {}).items():
                if settings is not None:
                    typed[role][split] = self._processor(settings, f"{where}.{role}.{split}")
        return typed

    def _processor(self, settings, where):
        name = settings.get("name")
        if not name:
            self.report.add(f"{where}.name", f"missing; known: {', '.join(registry.list_processors())}")
            return settings
        cls = self._class("processor", name, f"{where}.name")
        if cls is None:
            return settings
        rest = OmegaConf.masked_copy(settings, [key for key in settings if key != "name"])
        return OmegaConf.merge({"name": name}, OmegaConf.to_container(_typed(rest, cls.Config, where, self.report)))

    def _run(self, user):
        for kind, key in (("task", "task"), ("lr_scheduler", "lr_sched")):
            if user.get(key) is not None:
                self._class(kind, user[key], f"run.{key}")
        cls = self._class("runner", user.get("runner", "runner_base"), "run.runner")
        return user if cls is None else _typed(user, cls.Config, "run", self.report)

    def _class(self, kind, name, where, hint=""):
        try:
            return registry.get(kind, name)
        except RegistryError as error:
            self.report.add(where, f"{error}{hint}")
            return None

    def _check_values(self, node, where):
        """Report unset keys, the placeholder paths of the shipped files, and interpolations that lead nowhere."""
        for key in node:
            path = f"{where}.{key}"
            if OmegaConf.is_missing(node, key):
                self.report.add(path, "missing; it has no default")
                continue
            try:
                value = node[key]
            except OmegaConfBaseException as error:
                self.report.add(path, str(error).splitlines()[0])
                continue
            if isinstance(value, DictConfig):
                self._check_values(value, path)
            elif isinstance(value, str) and PLACEHOLDER in value:
                message = f"'{value}' is the placeholder of the shipped file; set it to your own path"
                self.report.add_line(f"{path}: {message}", is_content=True)


class _Report:
    """Collects problems and knows on which line of the user's file a key stands."""

    def __init__(self, unopened=()):
        self.problems, self.warnings = [], []
        self.unopened, self._patterns = {}, unopened  # {key: first problem}
        self._lines, self._file, self.from_options = {}, "", set()

    def locate(self, path):
        self._file = Path(path).name
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        self._walk(root, "")

    def _walk(self, node, where):
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            path = f"{where}.{key.value}".lstrip(".")
            self._lines[path] = key.start_mark.line + 1
            self._walk(value, path)

    def add(self, path, message):
        self.add_line(f"{path}: {message}")

    def add_line(self, line, is_content=False):
        """`is_content`: nothing is wrong with the key itself, but with what its value names."""
        path = line.split(":", 1)[0]
        if path in self.from_options:
            line += " (--options)"
        elif path in self._lines:
            line += f" ({self._file} line {self._lines[path]})"
        if is_content and any(fnmatch(path, pattern) for pattern in self._patterns):
            self.unopened.setdefault(path, line)
        else:
            self.problems.append(line)

    def unknown(self, path, what, known, guess=None):
        close = get_close_matches(guess or path.rsplit(".", 1)[-1], [str(name) for name in known], n=1)
        hint = f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(sorted(map(str, known)))}"
        self.add(path, f"unknown {what}.{hint}")


def _load_yaml(path):
    """Return a YAML file as a DictConfig. Raises ConfigError if it is absent, no YAML, or no mapping."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError([f"--cfg-path: no file at '{path}'"]) from None
    except IsADirectoryError:
        raise ConfigError([f"--cfg-path: '{path}' is a folder; give a YAML file"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"--cfg-path: '{path}' is not UTF-8 text; give a YAML file"]) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark else f": {str(error).splitlines()[0]}"
        raise ConfigError(
            [f"--cfg-path: '{path}' is not valid YAML{place}; look at brackets, quotes, indentation"]
        ) from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError([f"--cfg-path: '{path}' holds no sections; expected {', '.join(SECTIONS)}"])
    return loaded


def _without_secrets(node):
    """Return plain containers whose addresses are without passwords; where one is `${..}`, they are as they stand."""
    if isinstance(node, dict):
        return {key: _without_secrets(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_secrets(value) for value in node]
    is_address = isinstance(node, str) and node.startswith("http") and "${" not in node
    return without_secrets(node) if is_address else node


def _apply_options(user, options, report):
    """Overlay `--options`, given as `key=value` items or as `key value` pairs, on the user's configuration."""
    options = list(options or ())
    if options and "=" in options[0]:
        for item in (item for item in options if "=" not in item):
            report.problems.append(f"--options: '{item}' has no '='; write every item as KEY=VALUE")
        pairs = [item.split("=", 1) for item in options if "=" in item]
    else:
        if len(options) % 2:
            report.problems.append(f"--options: '{options[-1]}' has no value; write {options[-1]}=VALUE")
        pairs = list(zip(options[::2], options[1::2], strict=False))
    for key, text in pairs:
        report.from_options.add(key)
        try:
            value = _option_value(text)
            OmegaConf.update(user, key, value, merge=isinstance(value, dict), force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, IndexError) as error:
            report.problems.append(f"--options: cannot set '{key}': {str(error).splitlines()[0]}")


def _option_value(text):
    """Return the value of an option as YAML reads it, except that an unquoted `#` is text, never a comment."""
    if "#" in text and not text.startswith(("'", '"', "[", "{")):
        return text
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"] if text else ""


def _typed(section, schema, where, report):
    """Return `section` as a structured config of the dataclass `schema`; keys that do not fit are reported."""
    typed = OmegaConf.structured(schema)
    hints = typing.get_type_hints(schema)
    dead = getattr(schema, "DEAD_KEYS", {})
    for key, value in OmegaConf.to_container(section, resolve=False).items():
        path = f"{where}.{key}"
        if key in dead:
            report.warnings.append(f"{path}: this key does nothing: {dead[key]}")
        elif key not in hints:
            report.unknown(path, "key", hints)
        else:
            kind = _not_optional(hints[key])
            if dataclasses.is_dataclass(kind) and isinstance(value, dict):
                value = _typed(OmegaConf.create(value), kind, path, report)
            if kind is float and type(value) is int:
                value = float(value)
            try:
                typed[key] = value
            except OmegaConfBaseException:
                found = "null" if value is None else f"{value!r} ({type(value).__name__})"
                report.add(path, f"{found} is not {_describe(hints[key])}")
    return typed


def _not_optional(hint):
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _describe(hint):
    kind = _not_optional(hint)
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind))}"
    name = getattr(kind, "__name__", str(kind))
    if typing.get_origin(kind) is list:
        name = "list"
    return {"int": "an integer", "str": "text"}.get(name, f"a {name}") + (" or null" if kind is not hint else "")
