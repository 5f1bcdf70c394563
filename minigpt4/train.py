"""Train by a YAML file, on one device or, through torchrun, on many.

python train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
torchrun --nproc-per-node 4 train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
"""

import argparse
import sys

from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, add_config_arguments
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as `train` takes it; --resume becomes one of the --options."""
    parser = argparse.ArgumentParser(
        description="Train llama_proj, the linear layer between a frozen vision encoder and a frozen LLM.",
        epilog="Two stages: train_configs/minigpt4_stage1_pretrain.yaml, then minigpt4_stage2_finetune.yaml with "
        "model.ckpt set to the first stage's checkpoint. On several GPUs: torchrun --nproc-per-node N train.py ... "
        "Without weights or a GPU: make quickstart.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="resume from a checkpoint; auto: the newest good one below run.output_dir, or from the beginning if there "
        "is none, so that the same command starts a run and resumes it (sets run.resume_ckpt_path)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration and every path in it, print the plan (parts, parameters, memory), and exit; "
        "exit code 1: a training step does not fit into memory",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: plan for a GPU with so much memory, which need not be here",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run: plan for N processes with a GPU each, which need not be here (see run.shard_llm)",
    )
    args = parser.parse_args(argv)
    if args.resume:
        setting, options = ["run.resume_ckpt_path", args.resume], args.options or []
        args.options = options + (
            setting if options and "=" not in options[0] else ["=".join(setting)]
        )
    return args


def train(args: argparse.Namespace) -> int:
    """Return the exit code of the run, or of its plan; torch is imported only for a configuration that can be read."""
    startup.begin("configuration")
    if args.gpu_memory is not None:
        if not args.dry_run:
            raise ValueError(
                "--gpu-memory: plans for a GPU that need not be here; give --dry-run with it"
            )
        args.options = [*(args.options or []), "run.device=auto"]
    if args.gpus is not None and not (args.dry_run and args.gpus > 0):
        raise ValueError(
            f"--gpus {args.gpus}: plans for that many, 1 or more; give --dry-run with it"
        )
    cfg = Config(args, for_training=True)
    runner_class = registry.get_runner_class(cfg.run_cfg.runner)
    if args.dry_run:
        return runner_class.print_plan(cfg, args.gpu_memory, args.gpus)
    runner_class.run(cfg)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
