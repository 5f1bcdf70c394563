"""What a run says at its start and at its end."""

import logging
from collections import Counter
from typing import Any

from minigpt4.common import dist_utils
from minigpt4.common.dist_utils import main_print
from minigpt4.common.logger import whole_seconds
from minigpt4.runners.plan import parts_table


def introduce(run: Any) -> None:
    """Say what `run`, a runner, trains on what: the lines of the 2023 release, and a table."""
    train = [splits["train"] for splits in run.datasets.values() if "train" in splits]
    if len(train) > 1:
        ratios = [dataset.sample_ratio for dataset in train]
        mix = ", ".join(f"{dataset.name} {dataset.sample_ratio or 1:g}" for dataset in train)
        mix = mix if any(ratios) else "equal ratios"
        logging.info("Each batch is of one dataset, drawn by %s", mix)
    for dataset in train:
        if hasattr(dataset, "__len__"):
            logging.info("Loaded %d records for train split from the dataset.", len(dataset))
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            main_print(name)
    number = sum(parameter.numel() for parameter in run.trainable)
    main_print(f"number of trainable parameters: {number}")
    main_print(parts_table(run.model.parts()))
    if not run.run_cfg.valid_splits:
        logging.info("No validation splits found.")


def sum_up(run: Any, seconds: float, samples_seen: int) -> None:
    """Say how training went and what to do next."""
    main_print(f"Training time {whole_seconds(seconds)}")
    main_print(f"Samples seen: {samples_seen}; log and metrics: {run.output_dir}")
    print_skipped(run.train_loader)
    if run.last_checkpoint:
        main_print(f"Checkpoint: {run.last_checkpoint}")
        main_print(f"Next: use these weights by --options model.ckpt={run.last_checkpoint}")


def print_skipped(loader: Any) -> None:
    """Print how many samples of each dataset were skipped, by reason, on all ranks."""
    for name, counts in getattr(loader, "skip_report", dict)().items():
        total = sum(map(Counter, dist_utils.gather_from_ranks(counts)), Counter())
        met = total.pop("seen", 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.items())
        reasons = f" ({reasons})" if reasons else ""
        main_print(f"{name}: {total.total()} of {met} samples skipped{reasons}")
