"""What a run says at its start and at its end."""

import logging
from collections import Counter
from typing import Any

from minigpt4.common.dist_utils import gather_from_ranks, main_print
from minigpt4.common.logger import whole_seconds
from minigpt4.runners.plan import parts_table


def introduce(run: Any) -> None:
    """Say what `run`, a runner, trains on what: the lines of the 2023 release, and a table."""
    train = [splits["train"] for splits in run.datasets.values() if "train" in splits]
    if len(train) > 1:
        mix = ", ".join(f"{dataset.name} {dataset.sample_ratio or 1:g}" for dataset in train)
        is_mixed = any(dataset.sample_ratio for dataset in train)
        logging.info("Each batch is of one dataset, drawn by %s", mix if is_mixed else "equal ratios")
    for dataset in train:
        if hasattr(dataset, "__len__"):
            logging.info("Loaded %d records for train split from the dataset.", len(dataset))
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            main_print(name)
    main_print(f"number of trainable parameters: {sum(parameter.numel() for parameter in run.trainable)}")
    main_print(parts_table(run.model.parts()))
    for warning in run.model.warnings():
        logging.warning(warning)
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
        total = sum(map(Counter, gather_from_ranks(counts)), Counter())
        met, held_out = total.pop("seen", 0), total.pop("held_out", 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.items())
        rest = (f" ({reasons})" if reasons else "") + (f"; {held_out} left to val" if held_out else "")
        main_print(f"{name}: {total.total()} of {met} samples skipped{rest}")
