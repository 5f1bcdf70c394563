"""A check that the image processors of a configuration produce the images that the model's vision tower takes."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import Report


def check_images(datasets: DictConfig, wanted: Mapping[str, Any], report: Report) -> None:
    """Report image processors, of training and of answers, whose image size is not the model's.

    `wanted`: `image_size`, `mean` and `std` of the vision tower, {} without one. Another mean or std is only a warning.
    """
    if not wanted:
        return
    for name, section in datasets.items():
        for split in ("train", "eval"):
            where = f"datasets.{name}.vis_processor.{split}"
            if not report.is_clean(f"datasets.{name}.vis_processor"):
                continue
            try:
                processor = OmegaConf.select(section, f"vis_processor.{split}") or {}
                given = {key: processor.get(key) for key in wanted}
            except OmegaConfBaseException:  # check_values reports it
                continue
            size = given["image_size"]
            if size not in (None, wanted["image_size"]):
                message = f"{size}, but the model takes images of {wanted['image_size']} pixels; "
                message += "remove the line, or make it agree with model.image_size"
                report.add(f"{where}.image_size", message)
            for key in ("mean", "std"):
                if given[key] is not None and list(given[key]) != wanted[key]:
                    message = f"{list(given[key])}, but the model's vision tower was trained with "
                    message += f"{wanted[key]}; remove the line unless you mean it"
                    report.warnings.append(f"{where}.{key}: {message}")
