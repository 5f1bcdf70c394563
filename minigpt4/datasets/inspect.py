"""A look at the data before training: a contact sheet of what the model sees and learns, and counts of what is there.

    python -m minigpt4.datasets.inspect --cfg-path train_configs/embedded_stage1_pretrain.yaml

Datasets are built as training builds them and read in the order of its first epoch. Prompts and
target tokens come from the class of `model.arch`, through `text_preview`: no weights, no GPU.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, ConfigError, add_config_arguments
from minigpt4.common.registry import registry
from minigpt4.common.utils import printable
from minigpt4.datasets.download_stats import describe, read_download_stats

SCAN = 2000  # samples of each dataset, some seconds
SHARE_CUT = (
    4  # one in so many cards is kept for texts that are cut, where the first samples have none
)
MOST_CARDS = 400
# A look needs neither weights nor a device, and is possible where some shards are missing.
UNOPENED = ("model.vit_ckpt", "model.q_former_model", "model.ckpt", "run.device", "run.amp_dtype")
UNOPENED += (
    "run.resume_ckpt_path",
    "run.report_to",
    "run.tensorboard",
    "run.output_dir",
    "run.dist*",
)
UNOPENED += ("run.world_size", "model.llama_model")
UNOPENED += ("datasets.*.build_info.storage",)  # of these what is there is used


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m minigpt4.datasets.inspect",
        description="Look at the data of a training configuration as the model gets it: a contact sheet (HTML) and a "
        "table of counts for each dataset. Loads the tokenizer alone: no weights, no GPU.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--num", type=_between(1, MOST_CARDS), default=24, help="samples on the sheet (default: 24)"
    )
    help_text = "the sheet (default: <the YAML's name>_inspect.html)"
    parser.add_argument("--output", type=Path, metavar="HTML", help=help_text)
    help_text = (
        f"samples of each dataset that the table counts, in training's order (default: {SCAN})"
    )
    parser.add_argument(
        "--scan", type=_number_or_all, default=SCAN, metavar="N|all", help=help_text
    )
    args = parser.parse_args(argv)
    args.output = args.output or Path(f"{Path(args.cfg_path).stem}_inspect.html")
    if args.output.suffix.lower() == ".png":  # what it wrote once, so scripts name it
        args.output = args.output.with_suffix(".html")
        print(f"--output: the sheet is an HTML page, written to '{args.output}'", file=sys.stderr)
    if args.output.suffix.lower() not in (".html", ".htm"):
        parser.error(
            f"--output: '{args.output}'; the sheet is an HTML page, give a name that ends in .html"
        )
    return args


def _between(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} to {most}")
        return int(text)

    return integer


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else _between(1)(text)


@dataclass
class Scan:
    """What was found in one dataset; `lengths` counts texts by their tokens, `shown` are samples for the sheet."""

    dataset: Any
    missing: list = field(default_factory=list)  # shards
    is_whole: bool = False
    error: str = ""  # why the pass over the data ended early
    seconds: float = 0.0  # spent in reading, decoding, augmenting
    lengths: Counter = field(default_factory=Counter)
    num_cut: int = 0
    shown: list = field(default_factory=list)

    def percentile(self, percent: float) -> int:
        """Return the least length that `percent` % of the texts do not exceed."""
        rest = self.lengths.total() * percent / 100
        for length in sorted(self.lengths):
            rest -= self.lengths[length]
            if rest <= 0:
                return length
        raise ValueError("no text was scanned")


def inspect(args: argparse.Namespace) -> int:
    """Write the sheet and print the tables; return 1 where training could not use the data, else 0.

    Raises ConfigError, with every problem, unless the data can be looked at.
    """
    cfg = read_config(args)
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--output: no folder '{args.output.parent}'; make it, or give another path"
        )
    preview = _text_preview(cfg)
    splits = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg).build_datasets(cfg)
    datasets = [of_dataset["train"] for of_dataset in splits.values() if "train" in of_dataset]
    scans = []
    for number, dataset in enumerate(datasets):
        share = args.num // len(datasets) + (number < args.num % len(datasets))
        scans.append(scan(dataset, preview, cfg.run_cfg.seed, args.scan, share))
        print("\n".join(table(scans[-1], cfg)), end="\n\n")
    if any(found.shown for found in scans):
        from minigpt4.datasets.sheet import page

        content = page(*sheet(scans, preview, cfg, args))
        args.output.write_text(content, encoding="utf-8", errors="backslashreplace")
        print(f"sheet: {args.output} ({sum(len(found.shown) for found in scans)} samples)")
    if unopened := cfg.report.unopened.values():
        print("\n  ".join(["train.py would not start yet:", *map(str, unopened)]))
    return int(any(found.error or found.missing for found in scans))


def _text_preview(cfg: Config) -> Any:
    try:
        return registry.get_model_class(cfg.model_cfg.arch).text_preview(cfg.model_cfg)
    except (ValueError, OSError):
        if problem := cfg.report.unopened.get(
            "model.llama_model"
        ):  # the tokenizer is part of what is not there
            raise ConfigError([problem]) from None
        raise


def read_config(args: argparse.Namespace) -> Config:
    """Return the checked Config; raises ConfigError also for data of which nothing is there."""
    cfg = Config(args, for_training=True, unopened=UNOPENED)
    for warning in cfg.report.warnings:
        logging.warning(warning)
    for key in cfg.report.unopened:
        if key.startswith("datasets.") and not _has_some_shards(cfg, key.split(".")[1]):
            raise ConfigError(cfg.report.unopened.values())
    return cfg


def _has_some_shards(cfg: Config, name: str) -> bool:
    from minigpt4.datasets.builders.image_text_pair_builder import ShardsBuilder
    from minigpt4.datasets.datasets.shard_list import expand_shards, missing_shards

    section = cfg.datasets_cfg[name]
    if not issubclass(registry.get_builder_class(section.get("builder") or name), ShardsBuilder):
        return False
    try:
        shards = expand_shards(section["build_info"]["storage"])
    except ValueError:
        return False
    return len(missing_shards(shards)) < len(shards)


def scan(dataset: Any, preview: Any, seed: int, limit: int | None, num_shown: int) -> Scan:
    """Return the Scan of the first `limit` samples (None: all) that training reads from a dataset."""
    from minigpt4.datasets.datasets.base_dataset import DataError, Place
    from minigpt4.datasets.datasets.shard_list import missing_shards

    dataset.bind(Place(seed), max_bad_fraction=1.0)  # it is looked at, however bad it is
    found = Scan(dataset, missing_shards(getattr(dataset, "shards", ())))
    if missing := set(found.missing):
        dataset.shards = [shard for shard in dataset.shards if shard not in missing]
    samples, cut = dataset.one_pass(), []
    num_cut_shown = -(-num_shown // SHARE_CUT)
    with tqdm(
        total=limit, desc=f"scanning {dataset.name}", unit=" samples", disable=None
    ) as progress:
        while limit is None or dataset.skips.report()["seen"] < limit:
            start = time.perf_counter()
            try:
                sample = next(samples, None)
            except DataError as error:
                found.error = str(error)
                break
            found.seconds += time.perf_counter() - start
            if sample is None:
                found.is_whole = True
                break
            ((length, num_cut),) = preview.lengths([sample])
            found.lengths[length] += 1
            found.num_cut += num_cut > 0
            if len(found.shown) < num_shown:
                found.shown.append((sample, num_cut))
            elif num_cut and len(cut) < num_cut_shown:
                cut.append((sample, num_cut))
            progress.update(dataset.skips.report()["seen"] - progress.n)
    if not found.lengths:
        found.error = found.error or str(dataset.skips.nothing_usable())
    # texts that are cut take the place of the last ones that are not, until enough are shown
    whole = [index for index, (_, num_cut) in enumerate(found.shown) if not num_cut]
    num_needed = max(0, num_cut_shown - (len(found.shown) - len(whole)))
    for index, item in zip(reversed(whole), cut[:num_needed], strict=False):
        found.shown[index] = item
    return found


def table(found: Scan, cfg: Config) -> list[str]:
    """Return the lines that say what was found in one dataset."""
    dataset, rows = found.dataset, []
    if hasattr(dataset, "shards"):
        rows += _shard_rows(found)
    # What was read of the dataset, and what of it cannot be used, by reason.
    counts = dataset.skips.report()
    seen, held_out = counts.pop("seen"), counts.pop("held_out", 0)
    first = f"the first {seen:,} samples in training's order (--scan all for the rest)"
    rows.append(("scanned", f"all {seen:,} samples" if found.is_whole else first))
    bad = sum(counts.values())
    rows.append(("usable", f"{seen - bad:,}{_share(seen - bad, seen)}"))
    rows += [
        ("skipped", f"{number:,} {reason}{_share(number, seen)}")
        for reason, number in counts.items()
    ]
    if held_out:
        rows.append(("held out", f"{held_out:,} for the validation split (val_fraction)"))
    if bad > cfg.run_cfg.max_bad_fraction * seen:
        limit = f"run.max_bad_fraction={cfg.run_cfg.max_bad_fraction:g}"
        rows.append(
            (
                "",
                f"too many: training stops above {limit}, judged from a worker's thousandth sample on",
            )
        )
    if found.error:
        rows.append(("stopped", found.error))
    # How long the texts are against max_txt_len: what is cut off is not learnt.
    if total := found.lengths.total():
        lengths = ", ".join(
            f"{name} {found.percentile(q)}" for name, q in (("5%", 5), ("median", 50), ("95%", 95))
        )
        rows.append(
            ("text", f"tokens, end symbol included: {lengths}, longest {max(found.lengths)}")
        )
        cut = f"{found.num_cut:,} of {total:,} texts{_share(found.num_cut, total)}"
        rows.append(("cut", f"{cut} are longer than model.max_txt_len={cfg.model_cfg.max_txt_len}"))
        rows.append(("speed", f"{total / found.seconds:,.0f} img/s in one process"))
    return [dataset.name, *(f"  {name:<10}{text}" for name, text in rows)]


def _share(number: int, total: int) -> str:
    return f" ({number / total:.1%})" if total else ""


def _shard_rows(found: Scan) -> list[tuple[str, str]]:
    """Return the rows about tars, and about the downloads whose statistics lie beside them."""
    from minigpt4.datasets.datasets.shard_list import is_address

    shards = [*found.dataset.shards, *found.missing]
    missing = (
        f", {len(found.missing):,} missing (first: {found.missing[0]})"
        if found.missing
        else ", 0 missing"
    )
    rows = [("shards", f"{len(found.dataset.shards):,} found{missing}")]
    for folder in sorted({Path(shard).parent for shard in shards if not is_address(shard)}):
        try:
            stats = read_download_stats(folder)
        except ValueError as error:
            rows.append(("download", str(error)))
            continue
        lines = describe(stats) if stats.shards else [f"no statistics of img2dataset in {folder}"]
        rows += [("download" if not number else "", line) for number, line in enumerate(lines)]
    return rows


def sheet(
    scans: Sequence[Scan], preview: Any, cfg: Config, args: argparse.Namespace
) -> tuple[str, list, list]:
    """Return (title, notes, [(heading, cards)]): all that the sheet shows."""
    from minigpt4.datasets.sheet import Card

    model, groups = cfg.model_cfg, []
    for found in scans:
        cards = []
        for sample, _ in found.shown:
            tokens = preview.tokens(
                sample, f"{cfg.run_cfg.seed} {printable(sample['sample_id'], 1000)}"
            )
            pixels = sample["images"] if "images" in sample else [sample["image"]]
            images = list(map(found.dataset.vis_processor.to_image, pixels))
            cards.append(Card(f"{found.dataset.name}/{sample['sample_id']}", images, tokens))
        total = found.lengths.total()
        share = f"{found.num_cut / max(total, 1):.1%} of the texts are cut"
        groups.append((f"{found.dataset.name}: {len(cards)} of {total:,} samples; {share}", cards))
    # The settings that decide what is learnt stand above the images.
    prompts = "none"
    if preview.prompts:
        prompts = f"one of {len(preview.prompts)} in {model.prompt_path}, or the sample's own"
    limit = f"at most {model.max_txt_len} tokens of text (max_txt_len)"
    notes = [f"{limit}   end_sym {model.end_sym!r}   prompt: {prompts}"]
    if model.prompt_template:
        notes.append(f"prompt_template {model.prompt_template!r}")
    title = f"What the model sees and learns: {Path(args.cfg_path).name}"
    return title, notes, [(heading, cards) for heading, cards in groups if cards]


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(run_program(inspect, parse_args()))
