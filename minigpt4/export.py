"""Turn a checkpoint into a checkpoint folder, which one path opens, or an export for other programs, and back.

python -m minigpt4.export output/minigpt4_stage2_finetune/JOB/checkpoint_4.pth --to checkpoint my_minigpt4
python -m minigpt4.export my_minigpt4 --to hf my_minigpt4_hf
python -m minigpt4.export my_minigpt4_hf --to checkpoint my_minigpt4_again
"""

import argparse
import sys

from minigpt4.common.cli import run_program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `export`."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a training checkpoint, or a folder written by --to",
    )
    parser.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "FOLDER"),
        help="checkpoint: a checkpoint folder; hf: for transformers and programs built on it; gguf: for llama.cpp",
    )
    parser.add_argument(
        "--cfg-path",
        metavar="YAML",
        help="the model's configuration (default: the one stored in CHECKPOINT)",
    )
    parser.add_argument(
        "--options", nargs="+", metavar="KEY=VALUE", help="override settings of that configuration"
    )
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the trained weights, for manifest and model card",
    )
    args = parser.parse_args(argv)
    if args.to[0] not in FORMATS:
        parser.error(f"--to {args.to[0]}: expected one of {', '.join(FORMATS)}")
    return args


FORMATS = ("checkpoint", "hf", "gguf")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    args = parse_args(argv)
    from minigpt4.exporting.export import export  # imports torch

    return run_program(export, args)


if __name__ == "__main__":
    sys.exit(main())
