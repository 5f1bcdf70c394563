"""Whether the image processors of a configuration give the model the images that its vision tower takes."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.config_report import Report


def check_images(datasets: DictConfig, wanted: Mapping[str, Any], report: Report) -> None:
    """Report processors of another image size than the model's, for training and for answers alike.

    `wanted`: `image_size`, `mean` and `std` of the tower, {} without one. Another mean or std is a warning.
    """
    for name, section in datasets.items():
        for split in ("train", "eval") if wanted else ():
            where = f"datasets.{name}.vis_processor.{split}"
            if not report.is_clean(f"datasets.{name}.vis_processor"):
                continue
            try:
                processor = OmegaConf.select(section, f"vis_processor.{split}") or {}
                given = {key: processor.get(key) for key in wanted}
            except OmegaConfBaseException:  # check_values says it
                continue
            if (size := given["image_size"]) not in (None, wanted["image_size"]):
                message = f"{size}, but the model takes images of {wanted['image_size']} pixels; "
                message += "remove the line, or make it agree with model.image_size"
                report.add(f"{where}.image_size", message)
            for key in ("mean", "std"):
                if given[key] is not None and list(given[key]) != wanted[key]:
                    told = f"{list(given[key])}, but the model's vision tower was trained with {wanted[key]}"
                    report.warnings.append(
                        f"{where}.{key}: {told}; remove the line unless you mean it"
                    )
