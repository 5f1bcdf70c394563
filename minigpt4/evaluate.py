"""Answer one question about many images, or run benchmarks; an interrupted call resumes when it is repeated.

python evaluate.py --cfg-path eval_configs/minigpt4_eval.yaml --images my_pictures/ --output answers.jsonl
python evaluate.py --cfg-path eval_configs/minigpt4_eval.yaml --tasks pope vqav2 --output results
"""

import argparse
import os
import sys
from pathlib import Path

from minigpt4.common.checkpoint_folder import CHECKPOINT_HELP, with_checkpoint
from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, add_config_arguments
from minigpt4.common.image_files import IMAGE_SUFFIXES, list_files
from minigpt4.common.user_settings import BENCHMARKS
from minigpt4.evaluation.answering import Item, answer_file
from minigpt4.evaluation.compare import compare_results
from minigpt4.evaluation.run import add_benchmark_arguments, evaluate_benchmarks

# how --images asks; benchmarks have these settings in their sections
FOR_IMAGES = {
    "prompt": "Describe this image in detail.",
    "batch_size": 8,
    "max_new_tokens": 300,
    "temperature": 0.0,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of `evaluate`; --checkpoint becomes one of the --options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, required=False)
    parser.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT_HELP)
    parser.add_argument("--images", nargs="+", metavar="PATH", help="images, or folders of images")
    add_benchmark_arguments(parser)
    parser.add_argument(
        "--prompt",
        help=f"question about each image (default: {FOR_IMAGES['prompt']})",
    )
    parser.add_argument(
        "--output",
        help='with --images: file of lines {"image", "answer"}; a file beside it records the question and settings (default: '
        "answers.jsonl); else a folder (default: results)",
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: run.device)")
    parser.add_argument(
        "--batch-size", type=int, help=f"images per batch (default: {FOR_IMAGES['batch_size']})"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help=f"default: {FOR_IMAGES['max_new_tokens']}"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="0: greedy, the same answer each time (default)",
    )
    args = parser.parse_args(argv)
    if sum(map(bool, (args.images, args.tasks, args.compare))) != 1:
        parser.error("give one of --images, --tasks and --compare")
    if not args.compare:
        args = with_checkpoint(args, parser)
    for name, default in FOR_IMAGES.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.images:
            option = f"--{name.replace('_', '-')}"
            parser.error(
                f"{option} is for --images; of benchmarks: --options {BENCHMARKS}.NAME.KEY=VALUE"
            )
    if args.control and not args.tasks:
        parser.error("--control is for --tasks")
    args.output = Path(args.output or ("answers.jsonl" if args.images else "results"))
    return args


def find_images(paths: list[str]) -> list[str]:
    """Return the image files at `paths`, each once; folders are searched, symbolic links followed.

    Raises FileNotFoundError for a path without images.
    """
    images = {}
    for path in paths:
        files = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in list_files(path, follow_out=True)]
        if not files:
            kinds = ", ".join(IMAGE_SUFFIXES)
            raise FileNotFoundError(
                f"--images: no image at '{path}'; give files or folders with {kinds}"
            )
        for file in files:
            images.setdefault(place(file), str(Path(file)))
    return list(images.values())


def place(path: str) -> str:
    """Return the absolute path of a file, the same for all paths to it except through symbolic links."""
    plain = os.path.abspath(path)
    if os.path.exists(path) and not (os.path.exists(plain) and os.path.samefile(plain, path)):
        return os.path.join(
            os.getcwd(), path
        )  # a/../b where a is a symbolic link: abspath leads elsewhere
    return plain


def evaluate(args: argparse.Namespace) -> None:
    """Answer about the images without an answer yet, or run benchmarks, or compare two results."""
    if args.compare:
        compare_results(*args.compare, args.output / "comparison.html")
        return
    if args.tasks:
        evaluate_benchmarks(Config(args), args.tasks, args.output, args.device, args.control)
        return
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: {args.batch_size}; expected at least 1")
    items = [Item(image, (image,), args.prompt) for image in find_images(args.images)]
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    settings = {"key": "image", "identity": place, "batch_size": args.batch_size, **sampling}
    answer_file(args.output, items, Config(args), args.device, **settings)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(evaluate, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
