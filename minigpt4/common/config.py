"""YAML files and `--options` -> one typed, checked `Config`; nothing else merges or checks them.

Precedence, weakest first: the defaults of the registered class (its dataclass `Config`), the YAML
shipped for its type, the user's YAML, `--options`. The problems of all sections are reported at
once. What is printed and saved is unresolved, so that no log or checkpoint holds the value of
`${oc.env:TOKEN}`.
"""

import dataclasses
import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import ConfigError, Report
from minigpt4.common.config_report import Problem as Problem  # for users
from minigpt4.common.config_values import SECTIONS, apply_options, hide_secrets, load_yaml, typed
from minigpt4.common.own_code import import_modules
from minigpt4.common.registry import RegistryError, registry

REQUIRED = "???"  # default of a key that has none (OmegaConf's marker)
PLACEHOLDER = "/path/to/"
PACKAGE_DIR = Path(__file__).resolve().parents[1]
_DEAD_SECTIONS = ("preprocess",)


def add_config_arguments(parser: ArgumentParser) -> None:
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
    """Settings of the machine."""

    cache_root: str = REQUIRED  # everything downloaded or prepared goes below this folder


def load_environment() -> DictConfig:
    """Return the shipped `env` section."""
    return load_yaml(PACKAGE_DIR / "configs/default.yaml").env


class Config:
    """A checked configuration; `model_cfg`, `datasets_cfg`, `run_cfg`, `env_cfg` are its typed sections.

    `args` has `cfg_path` and `options` (see `add_config_arguments`). With `for_training` all sections
    must be there, and their files, folders, shards and devices too. Nothing heavy is loaded. Raises
    ConfigError with every problem found. What is wrong with what the keys of the patterns `unopened`
    name goes to `report.unopened` instead: the program does not open it.

    `image_settings`: the `image_size`, `mean` and `std` that the model's vision tower takes, {} without
    one. The image processors of `datasets` get from it what their sections leave out.
    """

    def __init__(self, args: Namespace, for_training: bool = False, unopened: Sequence[str] = ()) -> None:
        self.report = Report(unopened)
        # the user's file, with the options over it
        user = load_yaml(args.cfg_path)
        self.report.locate(args.cfg_path)
        apply_options(user, getattr(args, "options", None), self.report)
        self._check_roots(user, for_training)
        # own code registers names, so it comes before any of them is looked up
        folders = [Path(args.cfg_path).resolve().parent, Path.cwd()]
        imports = import_modules(OmegaConf.to_container(user).get("imports", []), folders, self.report)
        # the sections; the model's comes before those of datasets, whose images follow it
        env = OmegaConf.merge(load_environment(), user.get("env") or {})
        self.config = OmegaConf.create({"imports": imports} if imports else {})
        self.config.env = typed(env, EnvConfig, "env", self.report)
        self.config.model = self._model(user.get("model") or OmegaConf.create())
        self.image_settings = self._image_settings()
        self.config.datasets = {}
        for name, section in (user.get("datasets") or {}).items():
            self.config.datasets[name] = self._dataset(name, section or OmegaConf.create())
        self.config.run = self._run(user.get("run") or OmegaConf.create())
        if user.get("evaluation_datasets"):  # each section is checked when its benchmark is asked for
            self.config.evaluation_datasets = user.evaluation_datasets
        # what the values name; an answer needs no data, so its paths may be unset
        for root in SECTIONS if for_training else ("env", "model"):
            self._check_values(self.config[root], root)
        self._preflight(for_training)
        if self.report.problems:
            raise ConfigError([*self.report.problems, *self.report.unopened.values()])

    model_cfg = property(lambda self: self.config.model)
    datasets_cfg = property(lambda self: self.config.datasets)
    run_cfg = property(lambda self: self.config.run)
    env_cfg = property(lambda self: self.config.env)

    def to_dict(self) -> dict[str, Any]:
        """Return the merged configuration as plain containers to be shown and saved.

        Interpolations are unresolved; other addresses are without user, password and query.
        """
        return hide_secrets(OmegaConf.to_container(self.config, resolve=False))

    def pretty_print(self, log: Callable[..., None] = logging.info) -> None:
        """Log the sections, unresolved, in 2023's layout; warn of keys that do nothing any more."""
        for warning in self.report.warnings:
            logging.warning(warning)
        plain = self.to_dict()
        if "imports" in plain:
            log("\n=====  Imports    =====\n%s", json.dumps(plain["imports"], indent=4))
        log("\n=====  Running Parameters    =====\n%s", json.dumps(plain["run"], indent=4, sort_keys=True))
        log("\n======  Dataset Attributes  ======")
        for name, section in plain["datasets"].items():
            log("\n======== %s =======\n%s", name, json.dumps(section, indent=4, sort_keys=True))
        log("\n======  Model Attributes  ======\n%s", json.dumps(plain["model"], indent=4, sort_keys=True))

    def benchmark_cfg(self, name: str) -> DictConfig | None:
        """Return the typed section `evaluation_datasets.<name>` and its registered name as `benchmark`.

        What is wrong with it is added to `report`; None: the name is not registered.
        """
        where, sections = f"evaluation_datasets.{name}", self.config.setdefault("evaluation_datasets", {})
        if not isinstance(sections, DictConfig) or not isinstance(sections.get(name) or {}, (dict, DictConfig)):
            self.report.add(where, "no mapping; expected eval_file_path, img_path and other keys below it")
            return None
        user = sections.get(name) or OmegaConf.create()
        registered = user.get("benchmark") or name
        cls = self._class("benchmark", registered, where)
        if cls is None:
            return None
        sections[name] = typed(OmegaConf.merge(user, {"benchmark": registered}), cls.Config, where, self.report)
        self._check_values(sections[name], where)
        return sections[name]

    def _preflight(self, for_training: bool) -> None:
        """Let the classes of sections without problems look for files, shards and devices."""
        sections = [("model", "model", self.model_cfg.get("arch"), self.model_cfg)]
        if for_training:
            for name, cfg in self.datasets_cfg.items():
                sections.append(("builder", f"datasets.{name}", cfg.get("builder") or name, cfg))
            sections.append(("runner", "run", self.run_cfg.get("runner"), self.run_cfg))
        for kind, where, name, section in sections:
            if self.report.is_clean(where):
                self.report.add_found(registry.get(kind, name).preflight(section, where), where)

    def _check_roots(self, user: DictConfig, for_training: bool) -> None:
        for root in user:
            if root in _DEAD_SECTIONS:
                self.report.warnings.append(f"{root}: this section does nothing")
            elif root not in (known := (*SECTIONS, "imports", "evaluation_datasets")):
                self.report.unknown(str(root), "section", known)
        needed = ("model", "datasets", "run") if for_training else ("model",)
        for root in needed[1:]:  # without `model` the report asks for model.arch
            if not user.get(root):
                self.report.add(root, f"this section is missing; a configuration needs {', '.join(needed)}")

    def _model(self, user: DictConfig) -> DictConfig:
        arch, model_type = user.get("arch"), user.get("model_type")
        if not arch:
            self.report.add("model.arch", f"missing; known: {', '.join(registry.list_models())}")
            return user
        cls = self._class("model", arch, "model.arch")
        files = cls and cls.PRETRAINED_MODEL_CONFIG_DICT
        shipped = self._shipped(files, model_type, "model.model_type", f"type {model_type!r} of {arch}")
        if shipped is None:
            return user
        return typed(OmegaConf.merge(shipped.get("model") or {}, user), cls.Config, "model", self.report)

    def _image_settings(self) -> dict[str, Any]:
        """Return the images that the model takes; set `model.image_size` to the tower's if unset."""
        if not self.report.is_clean("model"):
            return {}
        try:
            image_format = registry.get("model", self.model_cfg.arch).image_format(self.model_cfg)
        except OmegaConfBaseException:  # _check_values says which value leads nowhere
            return {}
        except (ValueError, OSError) as error:
            self.report.add_found([str(error)], "model")
            return {}
        if image_format is None:
            return {}
        if self.model_cfg.get("image_size", 0) is None:
            self.model_cfg.image_size = image_format.size
        mean, std = list(image_format.mean), list(image_format.std)
        return {"image_size": image_format.size, "mean": mean, "std": std}

    def _dataset(self, section: str, user: DictConfig) -> DictConfig:
        """Return the typed section of the builder that its key `builder`, or else its name, names."""
        where = f"datasets.{section}"
        name, kind = user.get("builder") or section, user.get("type", "default")
        hint = "" if "builder" in user else f"; a section of any other name needs the key {where}.builder"
        cls = self._class("builder", name, where if hint else f"{where}.builder", hint)
        shipped = self._shipped(cls and cls.DATASET_CONFIG_DICT, kind, f"{where}.type", f"type {kind!r} of {name}")
        if shipped is None:
            return user
        merged = OmegaConf.merge((shipped.get("datasets") or {}).get(name) or {}, user)
        config = typed(merged, cls.Config, where, self.report)
        for role, defaults in (("vis_processor", self.image_settings), ("text_processor", {})):
            for split, settings in (config.get(role) or {}).items():
                if settings is not None:
                    config[role][split] = self._processor(settings, f"{where}.{role}.{split}", defaults)
        return config

    def _processor(self, settings: DictConfig, where: str, defaults: Mapping[str, Any]) -> DictConfig:
        """Return a processor's typed section, with those `defaults` that its class knows filled in."""
        given = OmegaConf.to_container(settings)
        name = given.pop("name", None)
        if not name:
            self.report.add(f"{where}.name", f"missing; known: {', '.join(registry.list_processors())}")
            return settings
        cls = self._class("processor", name, f"{where}.name")
        if cls is None:
            return settings
        known = [field.name for field in dataclasses.fields(cls.Config)]
        filled = {key: value for key, value in defaults.items() if key in known and given.get(key) is None}
        config = OmegaConf.to_container(typed(OmegaConf.create(given | filled), cls.Config, where, self.report))
        # an interpolation, still text here, is taken at its word
        size, wanted = config.get("image_size"), defaults.get("image_size")
        if isinstance(size, int) and wanted not in (None, size) and self.report.is_clean(where):
            message = f"{size}, but the model takes images of {wanted} pixels; "
            message += "remove the line, or make it agree with model.image_size"
            self.report.add(f"{where}.image_size", message)
        return OmegaConf.merge({"name": name}, config)

    def _run(self, user: DictConfig) -> DictConfig:
        for kind, key in (("task", "task"), ("lr_scheduler", "lr_sched")):
            if user.get(key) is not None:
                self._class(kind, user[key], f"run.{key}")
        cls = self._class("runner", user.get("runner", "runner_base"), "run.runner")
        return user if cls is None else typed(user, cls.Config, "run", self.report)

    def _class(self, kind: str, name: str, where: str, hint: str = "") -> type | None:
        try:
            return registry.get(kind, name)
        except RegistryError as error:
            self.report.add(where, f"{error}{hint}")
            return None

    def _shipped(self, files: Mapping[str, str] | None, kind: str, where: str, what: str) -> DictConfig | None:
        """Return the YAML that a class ships for `kind`, empty without any; None: unknown."""
        if not files:
            return None if files is None else OmegaConf.create()
        if kind in files:
            return load_yaml(PACKAGE_DIR / files[kind])
        self.report.unknown(where, what, files, guess=str(kind))
        return None

    def _check_values(self, node: DictConfig, where: str) -> None:
        """Report unset keys, placeholder paths, and interpolations that lead nowhere."""
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
                self.report.add(path, message, is_content=True)
