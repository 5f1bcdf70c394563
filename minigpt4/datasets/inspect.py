"""Inspect the data before training: a contact sheet of what the model sees and learns, and a table of counts.

    python -m minigpt4.datasets.inspect --cfg-path train_configs/embedded_stage1_pretrain.yaml

Datasets are built as for training and read in the order of its first epoch. Prompts and target
tokens come from `text_preview` of the class of `model.arch`, which needs no weights and no GPU.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, ConfigError, add_config_arguments
from minigpt4.common.registry import registry
from minigpt4.common.utils import printable
from minigpt4.datasets.scan import Scan, scan, table

SCAN = 2000  # default number of samples per dataset; takes some seconds
MOST_CARDS = 400
# Keys whose problems do not prevent an inspection: it needs no weights and no device.
UNOPENED = ("model.vit_ckpt", "model.q_former_model", "model.ckpt", "model.llama_model")
UNOPENED += ("run.device", "run.amp_dtype", "run.dist*", "run.world_size", "run.output_dir")
UNOPENED += ("run.resume_ckpt_path", "run.report_to", "run.tensorboard")
UNOPENED += ("datasets.*.build_info.storage",)  # if some shards are missing, the others are used


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m minigpt4.datasets.inspect",
        description="Look at the data of a training configuration as the model gets it: a contact sheet (HTML) and a "
        "table of counts for each dataset. Loads the tokenizer alone: no weights, no GPU.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--num", type=_between(1, MOST_CARDS), default=24, help="samples on the sheet (default: 24)"
    )
    about = "the sheet (default: <the YAML's name>_inspect.html)"
    parser.add_argument("--output", type=Path, metavar="HTML", help=about)
    about = f"samples of each dataset that the table counts, in training's order (default: {SCAN})"
    parser.add_argument("--scan", type=_number_or_all, default=SCAN, metavar="N|all", help=about)
    args = parser.parse_args(argv)
    args.output = args.output or Path(f"{Path(args.cfg_path).stem}_inspect.html")
    if args.output.suffix.lower() == ".png":  # earlier versions wrote PNG: scripts may ask for it
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


def inspect(args: argparse.Namespace) -> int:
    """Write the sheet and print the tables; return 1 if training could not use the data, else 0.

    Raises ConfigError, with all problems, if the configuration does not allow an inspection.
    """
    cfg = read_config(args)
    if not args.output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--output: no folder '{args.output.parent}'; make it, or give another path"
        )
    preview = _text_preview(cfg)
    task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
    built = task.build_datasets(cfg)
    datasets = [splits["train"] for splits in built.values() if "train" in splits]
    scans = []
    for number, dataset in enumerate(datasets):
        # the cards are shared evenly among the datasets; the first ones take the remainder
        num_cards = args.num // len(datasets) + (number < args.num % len(datasets))
        scans.append(scan(dataset, preview, cfg.run_cfg.seed, args.scan, num_cards))
        print("\n".join(table(scans[-1], cfg)), end="\n\n")
    num_samples = sum(len(each.shown) for each in scans)
    if num_samples:
        from minigpt4.datasets.sheet import page

        content = page(*sheet(scans, preview, cfg, args))
        args.output.write_text(content, encoding="utf-8", errors="backslashreplace")
        print(f"sheet: {args.output} ({num_samples} samples)")
    if problems := cfg.report.unopened.values():
        print("\n  ".join(["train.py would not start yet:", *map(str, problems)]))
    return int(any(each.error or each.missing for each in scans))


def _text_preview(cfg: Config) -> Any:
    try:
        return registry.get_model_class(cfg.model_cfg.arch).text_preview(cfg.model_cfg)
    except (ValueError, OSError):
        # if the LLM's folder is missing, so is its tokenizer, without which there is no preview
        if problem := cfg.report.unopened.get("model.llama_model"):
            raise ConfigError([problem]) from None
        raise


def read_config(args: argparse.Namespace) -> Config:
    """Return the checked Config. Raises ConfigError, also if there is no data at all in a section's storage."""
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


def sheet(
    scans: Sequence[Scan], preview: Any, cfg: Config, args: argparse.Namespace
) -> tuple[str, list, list]:
    """Return the content of the sheet: (title, notes, [(heading, cards)])."""
    import torch  # not at the top: --help does without it

    from minigpt4.datasets.sheet import Card
    from minigpt4.processors import BaseProcessor

    model, groups = cfg.model_cfg, []
    for found in scans:
        cards = []
        # a user's own processor, such as torchvision's Compose, may lack it
        to_image = getattr(found.dataset.vis_processor, "to_image", BaseProcessor().to_image)
        for sample, _ in found.shown:
            name = printable(sample["sample_id"], 1000)
            tokens = preview.tokens(sample, f"{cfg.run_cfg.seed} {name}")
            pixels = sample["images"] if "images" in sample else [sample["image"]]
            images = [to_image(torch.as_tensor(image)) for image in pixels]
            cards.append(Card(f"{found.dataset.name}/{sample['sample_id']}", images, tokens))
        total = found.lengths.total()
        share = f"{found.num_cut / max(total, 1):.1%} of the texts are cut"
        groups.append((f"{found.dataset.name}: {len(cards)} of {total:,} samples; {share}", cards))
    # notes above the images: the settings that determine what is learnt
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
