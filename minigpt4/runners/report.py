"""The messages of a run at its start and at its end."""

import logging
from collections import Counter
from typing import Any, NamedTuple

from minigpt4.common.dist_utils import gather_from_ranks, main_print
from minigpt4.common.logger import whole_seconds
from minigpt4.common.optims import rates
from minigpt4.models.training_parts import mode_table
from minigpt4.runners.plan import parts_table


def introduce(run: Any) -> None:
    """Log which datasets the runner `run` trains on and what it trains: the lines of the 2023 release, and a table."""
    train = [splits["train"] for splits in run.datasets.values() if "train" in splits]
    if len(train) > 1:
        mix = ", ".join(f"{dataset.name} {dataset.sample_ratio or 1:g}" for dataset in train)
        is_mixed = any(dataset.sample_ratio for dataset in train)
        logging.info(
            "Each batch is of one dataset, drawn by %s", mix if is_mixed else "equal ratios"
        )
    for dataset in train:
        if hasattr(dataset, "__len__"):
            logging.info("Loaded %d records for train split from the dataset.", len(dataset))
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            main_print(name)
    main_print(
        f"number of trainable parameters: {sum(parameter.numel() for parameter in run.trainable)}"
    )
    main_print(parts_table(run.model.parts()))
    if hasattr(run.model, "train_modes"):
        main_print(mode_table(run.model.train_modes, run.model.parts(), rates(run.run_cfg)))
    for warning in run.model.warnings():
        logging.warning(warning)
    if not run.run_cfg.valid_splits:
        logging.info("No validation splits found.")


def sum_up(run: Any, seconds: float, samples_seen: int) -> None:
    """Print how training went and how to use its checkpoint."""
    main_print(f"Training time {whole_seconds(seconds)}")
    main_print(f"Samples seen: {samples_seen}; log and metrics: {run.output_dir}")
    print_skipped(run)
    print_cache_use(run)
    if run.last_checkpoint:
        main_print(f"Checkpoint: {run.last_checkpoint}")
        main_print(f"Next: use these weights by --options model.ckpt={run.last_checkpoint}")


class SampleCounts(NamedTuple):
    """Per dataset {"samples": trained on, "met": read, "held_out", "skipped": {reason: number}}, sums over `num_ranks`."""

    of_dataset: dict[str, dict[str, Any]]
    num_ranks: int


def count_samples(run: Any, of_all_ranks: bool = True) -> SampleCounts:
    """Return what became of each dataset's samples, if the loader counts them; with `of_all_ranks` all ranks call it."""
    loader, mine = run.train_loader, {}
    for name, counts in getattr(loader, "skip_report", dict)().items():
        mine[name] = counts | {
            "trained on": _num_samples(loader, name, run.run_cfg.batch_size_train)
        }
    ranks = gather_from_ranks(mine) if of_all_ranks else [mine]
    counted = {}
    for name in mine:
        total = sum((Counter(each[name]) for each in ranks), Counter())
        counted[name] = {"samples": total.pop("trained on", 0), "met": total.pop("seen", 0)}
        counted[name] |= {"held_out": total.pop("held_out", 0), "skipped": dict(total)}
    return SampleCounts(counted, len(ranks))


def _num_samples(loader: Any, name: str, batch_size: int) -> int:
    """Return how many samples of a dataset this rank has trained on."""
    (dataset,) = (dataset for dataset in loader.datasets if dataset.name == name)
    return loader.state()["progress"][name]["batches"] * (dataset.batch_size or batch_size)


def print_skipped(run: Any) -> None:
    """Print how many samples of each dataset all ranks have skipped, by reason, also for the card. Called by all ranks."""
    counts = count_samples(run)
    for name, found in counts.of_dataset.items():
        skipped = found["skipped"]
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        rest = f" ({reasons})" if reasons else ""
        rest += f"; {found['held_out']} left to val" if found["held_out"] else ""
        main_print(f"{name}: {sum(skipped.values())} of {found['met']} samples skipped{rest}")
    if run.card:
        run.card.counts = counts


def print_cache_use(run: Any) -> None:
    """Print how datasets with a shard cache have used it, on all ranks since this start. Called by all ranks."""
    for dataset in getattr(run.train_loader, "datasets", ()):
        counts = gather_from_ranks(getattr(dataset, "cache_counts", dict)())
        if total := sum(map(Counter, counts), Counter()):
            main_print(
                f"{dataset.name}: run.shard_cache: {', '.join(f'{number} {use}' for use, number in total.items())}"
            )
