"""Answer one question about many images, as JSON lines; a call that was interrupted resumes where it stopped.

python evaluate.py --cfg-path eval_configs/minigpt4_eval.yaml --images my_pictures/ --output answers.jsonl
"""

import argparse
import sys
from pathlib import Path

from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, add_config_arguments
from minigpt4.evaluation.answering import Item, answer_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line as `evaluate` takes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH", help="images, or folders of images")
    parser.add_argument(
        "--prompt", default="Describe this image in detail.", help="what is asked (default: %(default)s)"
    )
    parser.add_argument("--output", default="answers.jsonl", help='lines {"image", "answer"} (default: %(default)s)')
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps (default: run.device)")
    parser.add_argument("--batch-size", type=int, default=8, help="images answered at once (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy, the same answer each time (default)")
    return parser.parse_args(argv)


def find_images(paths: list[str]) -> list[Path]:
    """Return the image files that `paths` name, folders searched. Raises FileNotFoundError for one without any."""
    images = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            kinds = ", ".join(SUFFIXES)
            raise FileNotFoundError(f"--images: no image at '{path}'; give files or folders with {kinds}")
        images += files
    return images


def evaluate(args: argparse.Namespace) -> None:
    """Write a line for every image that has none yet."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: {args.batch_size}; expected at least 1")
    items = [Item(str(image), (image,), args.prompt) for image in find_images(args.images)]
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    settings = {"key": "image", "batch_size": args.batch_size, **sampling}
    answer_file(Path(args.output), items, Config(args), args.device, **settings)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(evaluate, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
