"""Train the model that a YAML file configures, on one device or, with torchrun, on several.

python train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
torchrun --nproc-per-node 4 train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
"""

import argparse
import math
import sys

from minigpt4.common.checkpoint_folder import with_option
from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, add_config_arguments
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `train`; --resume becomes one of the --options."""
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
        help="resume from the checkpoint PATH; auto: from the newest intact one under run.output_dir, or start a new run if "
        "there is none, so that the same command starts and resumes a run (sets run.resume_ckpt_path)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration and every path in it, print the plan (parts, parameters, memory), and exit, "
        "with code 1 if a training step does not fit into memory",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: plan for a GPU with this much memory, instead of this machine's",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --dry-run: plan for N processes with one GPU each, whatever this machine has (see run.shard_llm)",
    )
    args = parser.parse_args(argv)
    if args.resume == "":
        parser.error("--resume: empty; give auto or the path of a checkpoint, or leave it out")
    if args.resume:
        args.options = with_option(args.options, "run.resume_ckpt_path", args.resume)
    return args


def train(args: argparse.Namespace) -> int:
    """Run the training or, with --dry-run, print its plan; return the exit code."""
    startup.begin("configuration")
    if args.gpu_memory is not None:
        if not (args.dry_run and 0 < args.gpu_memory < math.inf):
            raise ValueError(
                f"--gpu-memory {args.gpu_memory:g}: plans for a GPU of that many GiB, above 0, which need not be here; "
                "give --dry-run with it"
            )
        args.options = with_option(args.options, "run.device", "auto")
    if args.gpus is not None and not (args.dry_run and args.gpus > 0):
        raise ValueError(
            f"--gpus {args.gpus}: plans for that many, 1 or more; give --dry-run with it"
        )
    # the device of a GPU that need not be here is not checked
    cfg = Config(
        args, for_training=True, unopened=() if args.gpu_memory is None else ["run.device"]
    )
    # imports torch, so only for a configuration without problems
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
