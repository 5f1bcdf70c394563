"""The settings of the user: the YAML file overridden by `--options`, read section by section."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.checkpoint_folder import is_checkpoint_folder, opened
from minigpt4.common.config_report import Report
from minigpt4.common.config_values import apply_options
from minigpt4.common.own_code import shipped_imports
from minigpt4.common.utils import first_line
from minigpt4.common.yaml_file import read_yaml

SECTIONS = ("env", "model", "datasets", "run")
BENCHMARKS = "evaluation_datasets"  # each section in it is checked when its benchmark is opened
_DEAD_SECTIONS = ("preprocess",)


class UserSettings:
    """The user's settings as an OmegaConf `config`, and the same as `plain` containers.

    `args` has `cfg_path` and `options`; `path` is the YAML file. Problems are added to `report`, and so is the place
    where each key was set.
    """

    def __init__(self, args: Namespace, report: Report) -> None:
        self.report = report
        self.path, options = opened(args)
        self.config, lines = read_yaml(self.path)
        report.places = {key: f"{self.path.name} line {line}" for key, line in lines.items()}
        if is_checkpoint_folder(self.path.parent) and "imports" in self.config:
            self.config.imports = shipped_imports(self.config.imports, self.path)
        apply_options(self.config, options, report)
        self.plain = OmegaConf.to_container(self.config)

    def roots(self, for_training: bool) -> dict[str, dict[str, Any]]:
        """Return {name: plain section} of all sections, {} for a section that is not there."""
        known = (*SECTIONS, "imports", BENCHMARKS)
        for root in self.plain:
            if root in _DEAD_SECTIONS:
                self.report.warnings.append(f"{root}: this section does nothing")
            elif root not in known:
                self.report.unknown(str(root), "section", known)
        needed = ("model", "datasets", "run") if for_training else ("model",)
        for root in needed[1:]:  # without `model` the report asks for model.arch
            if not self.plain.get(root):
                self.report.add(
                    root, f"this section is missing; a configuration needs {', '.join(needed)}"
                )
        return {root: self.section(self.plain, root, root) for root in (*SECTIONS, BENCHMARKS)}

    def section(self, parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
        """Return the plain mapping at a key of `parent`, {} for none; report any other value under the key `where`."""
        value = self.filled_in(parent.get(key), where)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if value and not isinstance(value, dict):
            message = f"{value!r} ({type(value).__name__}) is no section; write its keys below it, as `key: value`"
            self.report.add(where, message)
        return value if isinstance(value, dict) else {}

    def filled_in(self, value: Any, where: str) -> Any:
        """Return `value`, the user's setting of the key `where`, its interpolation resolved within the user's settings."""
        if not (isinstance(value, str) and "${" in value):
            return value
        try:
            return OmegaConf.select(self.config, where)
        except OmegaConfBaseException as error:
            self.report.add(where, first_line(error))
            return None
