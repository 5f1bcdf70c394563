"""The section `env`, and `as_section`, which makes a complete section of any mapping."""

import dataclasses
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_paths import PACKAGE_DIR, settle_paths
from minigpt4.common.config_report import ConfigError, Problem, Report
from minigpt4.common.config_values import check_values, typed
from minigpt4.common.yaml_file import read_yaml

REQUIRED = "???"  # in place of a default, for a key that must be set (OmegaConf's marker)


@dataclasses.dataclass
class EnvConfig:
    """The section `env`: settings of the machine."""

    cache_root: str = REQUIRED  # folder for everything that is downloaded or prepared

    WRITTEN_PATHS = ("cache_root",)


def load_environment() -> DictConfig:
    """Return the shipped `env` section."""
    return read_yaml(PACKAGE_DIR / "configs/default.yaml")[0].env


def _plain(cfg: Mapping, where: str) -> dict:
    """Return a mapping as a dict, resolved as far as possible. Raises ConfigError for anything else."""
    if not isinstance(cfg, Mapping):
        found = f"{type(cfg).__name__} {cfg!r:.80}"
        raise ConfigError(
            [Problem(where, f"{found}; expected a mapping, such as the section of a YAML file")]
        )
    if not OmegaConf.is_config(cfg):
        return dict(cfg)
    try:  # interpolations into the configuration that it is a part of
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # else left to the shipped `env`, see as_section
        return OmegaConf.to_container(cfg)


def as_section(cfg: Mapping | None, schema: type, where: str) -> DictConfig:
    """Return a section with every key of the dataclass `schema`: any mapping, or None, checked and with the defaults.

    A section that has been checked before is returned unchanged. So `from_config` accepts the plain content of a YAML
    file, as in 2023. `where` is the key of the section in messages. Raises ConfigError.
    """
    if OmegaConf.is_config(cfg) and OmegaConf.get_type(cfg) is schema:
        return cfg
    report = Report()
    plain = _plain({} if cfg is None else cfg, where)
    whole = OmegaConf.create({"env": load_environment()})
    OmegaConf.update(whole, where, typed(plain, schema, where, report), merge=False)
    section = OmegaConf.select(whole, where)
    settle_paths(section, where, (), report)
    check_values(section, where, report)
    if report.problems:
        raise ConfigError(report.problems)
    return section
