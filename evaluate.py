"""Answer one question about many images, as JSON lines; a call that was interrupted goes on where it stopped.

python evaluate.py --cfg-path eval_configs/minigpt4_eval.yaml --images my_pictures/ --output answers.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from minigpt4 import load_config
from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, add_config_arguments

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def parse_args(argv=None):
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


def find_pictures(paths):
    """Return the image files that `paths` name, folders searched. Raises FileNotFoundError for one without any."""
    found = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in PICTURES) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            kinds = ", ".join(PICTURES)
            raise FileNotFoundError(f"--images: no image at '{path}'; give files or folders with {kinds}")
        found += files
    return found


def answered(output):
    """Return the images that have a line in `output` already; a last line that was cut short is taken away.

    Raises ValueError if it is another kind of file.
    """
    text = output.read_text(encoding="utf-8") if output.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = whole.splitlines()
    try:
        done = {json.loads(line)["image"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output: '{output}' is no answer file ({error}); give another name") from error
    if text and not lines and not text.startswith('{"image"'):
        raise ValueError(f"--output: '{output}' is no answer file; give another name")
    if whole != text:
        output.write_text(whole, encoding="utf-8")
    return done


def answer_pictures(chat, conv, pictures, args):
    """Yield {"image", "answer"}, or {"image", "error"} for an image that cannot be read, in batches."""
    for start in range(0, len(pictures), args.batch_size):
        images = []
        for picture in pictures[start : start + args.batch_size]:
            try:
                images.append((picture, chat.encode_images([picture])))
            except (ValueError, OSError) as error:
                yield {"image": str(picture), "error": str(error)}
        convs = [conv.copy() for _ in images]
        for one in convs:
            one.append_image()
            chat.ask(args.prompt, one)
        settings = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
        answers = chat.answer_batch(convs, [embeds for _, embeds in images], **settings) if images else []
        for (picture, _), (text, _) in zip(images, answers, strict=True):
            yield {"image": str(picture), "answer": text}


def evaluate(args):
    """Write a line for every image that has none yet."""
    from tqdm import tqdm

    if args.batch_size < 1:
        raise ValueError(f"--batch-size: {args.batch_size}; expected at least 1")
    output = Path(args.output)
    done = answered(output)
    pictures = [picture for picture in find_pictures(args.images) if str(picture) not in done]
    cfg = Config(args)
    chat, conv = load_config(cfg, args.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        for record in tqdm(answer_pictures(chat, conv, pictures, args), total=len(pictures), unit="picture"):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(pictures)} answers added to {output}, {len(done)} were there")


if __name__ == "__main__":
    sys.exit(run_program(evaluate, parse_args()))
