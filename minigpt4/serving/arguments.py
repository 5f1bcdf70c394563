"""What the command lines of the programs that chat have in common: which model, on which device."""

import argparse
import sys

from minigpt4.common.checkpoint_folder import CHECKPOINT_HELP
from minigpt4.common.config import PACKAGE_DIR, Config, add_config_arguments
from minigpt4.common.utils import expand_path


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --cfg-path, --options, --checkpoint, --device and --gpu-id."""
    add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT_HELP)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: run.device)")
    where.add_argument(
        "--gpu-id", type=int, metavar="N", help="--device cuda:N; where there is no CUDA, the CPU"
    )


def device_of(args: argparse.Namespace, cfg: Config) -> str | None:
    """Return the name of the device, None for `run.device`; an 8-bit LLM goes to the same GPU."""
    if args.gpu_id is None:
        return args.device
    import torch

    if not torch.cuda.is_available():
        print(
            f"--gpu-id {args.gpu_id}: torch sees no CUDA GPU on this machine; the CPU is used",
            file=sys.stderr,
        )
        return "cpu"
    cfg.model_cfg.device_8bit = args.gpu_id
    return f"cuda:{args.gpu_id}"


def first_settings(cfg: Config) -> dict[str, float]:
    """Return the settings of answers that a model begins with.

    The small vision weights that the package ships answer no better for being sampled: greedy.
    """
    is_small = expand_path(cfg.model_cfg.vit_ckpt).resolve().is_relative_to(PACKAGE_DIR)
    return {"temperature": 0.0 if is_small else 1.0}
