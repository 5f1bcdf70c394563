"""YAML files and `--options` become one typed, checked `Config`. Only this module merges and checks them.

Precedence, weakest first: the defaults of the registered class (its dataclass `Config`), the YAML
shipped for its type, the user's YAML, `--options`. The problems of all sections are reported at
once. Interpolations are printed and saved unresolved, so that no log or checkpoint contains the
value of `${oc.env:TOKEN}`.
"""

import dataclasses
import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_images import check_images
from minigpt4.common.config_paths import PACKAGE_DIR, settle_paths
from minigpt4.common.config_report import ConfigError, Report
from minigpt4.common.config_report import Problem as Problem  # for users
from minigpt4.common.config_section import REQUIRED as REQUIRED  # for users
from minigpt4.common.config_section import EnvConfig, load_environment
from minigpt4.common.config_section import as_section as as_section
from minigpt4.common.config_values import check_values, hide_secrets, overlaid, typed
from minigpt4.common.own_code import import_modules
from minigpt4.common.registry import RegistryError, registry
from minigpt4.common.user_settings import BENCHMARKS, SECTIONS, UserSettings
from minigpt4.common.utils import first_line
from minigpt4.common.yaml_file import read_yaml


def add_config_arguments(parser: ArgumentParser, required: bool = True) -> None:
    """Add the two options that every program has, `--cfg-path` and `--options`, to an argparse parser."""
    parser.add_argument("--cfg-path", required=required, metavar="YAML", help="configuration file")
    example = "run.max_epoch=2 model.ckpt=out/checkpoint_3.pth (or pairs: run.max_epoch 2)"
    help_text = f"override settings of the file, e.g. {example}"
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help=help_text)


class Config:
    """A checked configuration; `model_cfg`, `datasets_cfg`, `run_cfg`, `env_cfg` are its typed sections.

    `args` has `cfg_path` and `options` (see `add_config_arguments`). With `for_training` all sections
    are required, and the files, folders, shards and devices that they name must exist. Nothing heavy
    is loaded. Raises ConfigError with every problem found. Problems with files that the program does
    not open, those of keys that match the patterns `unopened`, go to `report.unopened` instead.

    `image_settings`: the `image_size`, `mean` and `std` that the model's vision tower takes, {} without
    one; they are the defaults of the image processors of `datasets`.
    """

    def __init__(
        self, args: Namespace, for_training: bool = False, unopened: Sequence[str] = ()
    ) -> None:
        self.report = Report(unopened)
        self._user = UserSettings(args, self.report)
        sections = self._user.roots(for_training)
        # the user's modules register names, so import them before any name is looked up
        self._folders = [self._user.path.resolve().parent]
        modules = self._user.plain.get("imports", [])
        imports = import_modules(modules, [*self._folders, Path.cwd()], self.report)
        # all sections as the user wrote them, for interpolations; then each typed, the model before the
        # datasets, whose image processors follow it
        as_written = {"imports": imports} if imports else {}
        as_written |= {root: sections[root] for root in SECTIONS}
        self.config = OmegaConf.create(as_written)
        env = overlaid(OmegaConf.to_container(load_environment()), sections["env"])
        self.config.env = self._typed(env, EnvConfig, "env")
        self.config.model = self._model(sections["model"])
        self.image_settings = self._image_settings()
        for name in sections["datasets"]:
            section = self._user.section(sections["datasets"], name, f"datasets.{name}")
            self.config.datasets[name] = self._dataset(name, section)
        self.config.run = self._run(sections["run"])
        self._benchmarks = sections[BENCHMARKS]
        # unset and placeholder values; only training needs the paths of datasets
        for root in SECTIONS if for_training else ("env", "model"):
            is_section = all(problem.key != root for problem in self.report.problems)
            if is_section:
                check_values(self.config[root], root, self.report)
        check_images(self.datasets_cfg, self.image_settings, self.report)
        if self.report.is_clean("env"):
            self._preflight(for_training)
        if self.report.problems:
            raise ConfigError([*self.report.problems, *self.report.unopened.values()])

    model_cfg = property(lambda self: self.config.model)
    datasets_cfg = property(lambda self: self.config.datasets)
    run_cfg = property(lambda self: self.config.run)
    env_cfg = property(lambda self: self.config.env)

    def to_dict(self) -> dict[str, Any]:
        """Return the merged configuration in plain containers, safe to show and save.

        Interpolations are unresolved, and URLs are without user, password and query.
        """
        return hide_secrets(OmegaConf.to_container(self.config, resolve=False))

    @property
    def image_processor(self) -> dict[str, Any]:
        """The image processor of a chat: the first that a dataset section has, `eval` before `train`, else a resize."""
        for section in self.datasets_cfg.values():
            if named := section.vis_processor.eval or section.vis_processor.train:
                return OmegaConf.to_container(named, resolve=True)
        return {"name": "blip2_image_eval", **self.image_settings}

    def pretty_print(self, log: Callable[..., None] = logging.info) -> None:
        """Log the sections, unresolved, in the layout of 2023; warn of keys that have no effect."""
        for warning in self.report.warnings:
            logging.warning(warning)
        plain = self.to_dict()
        if "imports" in plain:
            log("\n=====  Imports    =====\n%s", json.dumps(plain["imports"], indent=4))
        as_text = partial(json.dumps, indent=4, sort_keys=True)
        log("\n=====  Running Parameters    =====\n%s", as_text(plain["run"]))
        log("\n======  Dataset Attributes  ======")
        for name, section in plain["datasets"].items():
            log("\n======== %s =======\n%s", name, as_text(section))
        log("\n======  Model Attributes  ======\n%s", as_text(plain["model"]))

    def benchmark_cfg(self, name: str) -> DictConfig | None:
        """Return the typed section `evaluation_datasets.<name>`, with its registered name as `benchmark`.

        Problems are added to `report`; None if the name is not registered or the section malformed.
        """
        where = f"{BENCHMARKS}.{name}"
        user = self._user.section(self._benchmarks, name, where)
        registered = self._user.filled_in(user.get("benchmark"), f"{where}.benchmark") or name
        cls = self._class("benchmark", registered, where)
        if cls is None or not self.report.is_clean(where):
            return None
        # look it up below: the first `setdefault` returns the given {}, no part of the configuration
        self.config.setdefault(BENCHMARKS, {})
        section = user | {"benchmark": registered}
        self.config[BENCHMARKS][name] = self._typed(section, cls.Config, where)
        check_values(self.config[BENCHMARKS][name], where, self.report)
        return self.config[BENCHMARKS][name]

    def _preflight(self, for_training: bool) -> None:
        """Let the classes of the sections without problems check files, shards and devices."""
        sections = [("model", "model", "arch")]
        if for_training:
            sections += [("builder", f"datasets.{name}", "builder") for name in self.datasets_cfg]
            sections.append(("runner", "run", "runner"))
        for kind, where, key in sections:
            if self.report.is_clean(where):
                section = OmegaConf.select(self.config, where)
                name = section.get(key) or where.removeprefix("datasets.")
                try:
                    found = registry.get(kind, name).preflight(section, where)
                except (ValueError, OSError) as error:  # of a path that is wrong in another section
                    found = [str(error)]
                self.report.add_found(found, where)

    def _typed(self, section: dict[str, Any], schema: type, where: str) -> DictConfig:
        """Return a typed section, with its paths looked up."""
        config = typed(section, schema, where, self.report)
        settle_paths(config, where, self._folders, self.report)
        return config

    def _model(self, user: dict[str, Any]) -> DictConfig:
        """Return the typed `model` section of the class `arch`; as the user wrote it if there is no such class."""
        arch = self._user.filled_in(user.get("arch"), "model.arch")
        model_type = self._user.filled_in(user.get("model_type"), "model.model_type")
        if not arch and self.report.is_clean("model.arch"):
            self.report.add("model.arch", f"missing; known: {', '.join(registry.list_models())}")
        if not arch:
            return OmegaConf.create(user)
        cls = self._class("model", arch, "model.arch")
        files = cls and cls.PRETRAINED_MODEL_CONFIG_DICT
        shipped = self._shipped(
            files, model_type, "model.model_type", f"type {model_type!r} of {arch}"
        )
        if shipped is None:
            return OmegaConf.create(user)
        return self._typed(overlaid(shipped.get("model") or {}, user), cls.Config, "model")

    def _image_settings(self) -> dict[str, Any]:
        """Return `image_settings`; let the model's class fill in settings that its weight files determine."""
        if not (self.report.is_clean("env") and self.report.is_clean("model")):
            return {}
        try:
            model = registry.get("model", self.model_cfg.arch)
            image_format = model.image_format(self.model_cfg)
            model.settle(self.model_cfg)
        except OmegaConfBaseException as error:
            # an interpolation that is broken, or to a default of `run`, which is not known yet
            self.report.add(str(error.full_key or "model"), first_line(error))
            return {}
        except (ValueError, OSError) as error:
            self.report.add_found([str(error)], "model")
            return {}
        if image_format is None:
            return {}
        mean, std = list(image_format.mean), list(image_format.std)
        return {"image_size": image_format.size, "mean": mean, "std": std}

    def _dataset(self, section: str, user: dict[str, Any]) -> DictConfig:
        """Return the typed section of the builder named by its key `builder`, or else by its own name."""
        where = f"datasets.{section}"
        name = self._user.filled_in(user.get("builder"), f"{where}.builder") or section
        kind = self._user.filled_in(user.get("type", "default"), f"{where}.type")
        if user.get("builder"):
            cls = self._class("builder", name, f"{where}.builder")
        else:
            hint = f"; a section of any other name needs the key {where}.builder"
            cls = self._class("builder", name, where, hint)
        files = cls and cls.DATASET_CONFIG_DICT
        shipped = self._shipped(files, kind, f"{where}.type", f"type {kind!r} of {name}")
        if shipped is None:
            return OmegaConf.create(user)
        shipped = (shipped.get("datasets") or {}).get(name) or {}
        config = self._typed(overlaid(shipped, user), cls.Config, where)
        # its processors; those of images follow the model
        plain = OmegaConf.to_container(config)
        for role, defaults in (("vis_processor", self.image_settings), ("text_processor", {})):
            splits = plain.get(role)
            for split in splits if isinstance(splits, dict) else ():
                key = f"{where}.{role}.{split}"
                if settings := self._user.section(splits, split, key):
                    config[role][split] = self._processor(settings, key, defaults)
        return config

    def _processor(
        self, given: dict[str, Any], where: str, defaults: Mapping[str, Any]
    ) -> DictConfig:
        """Return a processor's typed section; those of `defaults` that its class has as keys fill what is unset."""
        name = self._user.filled_in(given.get("name"), f"{where}.name")
        if not name:
            self.report.add(
                f"{where}.name", f"missing; known: {', '.join(registry.list_processors())}"
            )
        cls = self._class("processor", name, f"{where}.name") if name else None
        if cls is None:
            return OmegaConf.create(given)
        given = {key: value for key, value in given.items() if key != "name"}
        for field in dataclasses.fields(cls.Config):
            if field.name in defaults and given.get(field.name) is None:
                given[field.name] = defaults[field.name]
        config = self._typed(given, cls.Config, where)
        return OmegaConf.create({"name": name} | OmegaConf.to_container(config))

    def _run(self, user: dict[str, Any]) -> DictConfig:
        """Return the typed `run` section of the class `runner`; as the user wrote it if there is no such class."""
        # as in the newest release: not needed where each dataset has a batch size of its own
        with suppress(OmegaConfBaseException, TypeError):  # check_values reports what is no number
            sizes = [section.get("batch_size") for section in self.config.datasets.values()]
            if sizes and all(sizes):
                user = {"batch_size_train": max(sizes)} | user
        for kind, key in (("task", "task"), ("lr_scheduler", "lr_sched")):
            if (name := self._user.filled_in(user.get(key), f"run.{key}")) is not None:
                self._class(kind, name, f"run.{key}")
        name = self._user.filled_in(user.get("runner"), "run.runner")
        cls = self._class("runner", "runner_base" if name is None else name, "run.runner")
        return OmegaConf.create(user) if cls is None else self._typed(user, cls.Config, "run")

    def _class(self, kind: str, name: str, where: str, hint: str = "") -> type | None:
        """Return a registered class; None, and a problem of the key `where`, for an unknown name."""
        try:
            return registry.get(kind, name)
        except RegistryError as error:
            self.report.add(where, f"{error}{hint}")
            return None

    def _shipped(
        self, files: Mapping[str, str] | None, kind: Any, where: str, what: str
    ) -> dict[str, Any] | None:
        """Return the plain YAML that a class ships for the type `kind`, from its table `files` {type: path}.

        {} if it ships none; None if there is no class, or, with a problem of the key `where`, no such type.
        """
        if files is None:
            return None
        if not files:
            return {}
        if isinstance(kind, str) and kind in files:
            return OmegaConf.to_container(read_yaml(PACKAGE_DIR / files[kind])[0])
        self.report.unknown(where, what, files, guess=str(kind))
        return None
