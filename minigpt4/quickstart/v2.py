"""A small MiniGPT-v2 on the drawn world: `make quickstart-v2`, or `python -m minigpt4.quickstart.v2`.

Draws images and writes them as official annotation files (instructions.py), trains `minigpt_v2` on them by train.py,
first on captions alone, then on all tasks, and asks it by evaluate.py about images that no training shows: [refer],
[identify] and [vqa], also with blank images.
Written to --output: checkpoint.pth, report.json, and results with and without images. What is there is used again.
"""

import argparse
import filecmp
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from minigpt4.common.cli import run_program
from minigpt4.quickstart.quickstart import require_environment, train_once

FIRST_STAGE = "train_configs/embedded_v2_stage1.yaml"
TRAINING, EVALUATION = "train_configs/embedded_v2.yaml", "eval_configs/embedded_v2_eval.yaml"
WEIGHTS = Path(__file__).parent / "weights/manifest_boxes.json"
TASKS = {"refcoco": "[refer]", "identify": "[identify]", "gqa": "[vqa]"}
CONTROL = "blank"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/quickstart_v2"))
    parser.add_argument(
        "--prepare", action="store_true", help="draw the images and fetch the LLM, no more"
    )
    parser.add_argument(
        "--cache-root", help="default: env.cache_root of minigpt4/configs/default.yaml"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="more options for training and evaluation",
    )
    return parser.parse_args(argv)


def prepare(cache_root: str | None) -> Path:
    """Return the folder of annotation files and images, with the LLM and a start beside it; made if absent."""
    from minigpt4.quickstart.alignment import write_start
    from minigpt4.quickstart.instructions import VERSION, write_instructions
    from minigpt4.quickstart.llm import prepare_llm
    from minigpt4.quickstart.prepare import cache_folder

    cache = cache_folder(cache_root)
    llm = prepare_llm(cache / "llm")
    folder = write_instructions(cache / f"instructions-v{VERSION}")
    write_start(WEIGHTS.with_name("eva_vit_boxes.safetensors"), llm, folder / "llama_proj.pth")
    return folder


def train(args: argparse.Namespace, options: list[str]) -> Path:
    """Return a copy of the trained checkpoint in the output folder; trained unless it is there."""
    made_of = WEIGHTS.read_bytes()
    first, folder = args.output / "stage1", args.output / "training"
    seen = train_once(FIRST_STAGE, first, [*options, f"run.output_dir={first}"], made_of)
    # what stage 1 depended on, stage 2 does too: its file's name tells neither
    made_of += (first / "finished.json").read_bytes()
    options = [*options, f"model.ckpt={seen}", f"run.output_dir={folder}"]
    trained = train_once(TRAINING, folder, options, made_of)
    kept = args.output / "checkpoint.pth"
    if not kept.is_file() or not filecmp.cmp(trained, kept, shallow=False):
        shutil.rmtree(args.output / "evaluation", ignore_errors=True)  # of another checkpoint
        shutil.copyfile(trained, kept)
    return kept


def evaluate(output: Path, options: list[str]) -> dict[str, dict[str, dict]]:
    """Return {"": {task: results}, "blank": {task: results}} of evaluate.py's benchmarks. Raises SystemExit."""
    from minigpt4.evaluate import main as evaluate_main
    from minigpt4.evaluation.results import read_results

    found: dict[str, dict[str, dict]] = {}
    for control in ("", CONTROL):
        arguments = [
            "--cfg-path",
            EVALUATION,
            "--tasks",
            *TASKS,
            "--output",
            str(output / "evaluation"),
        ]
        arguments += ["--control", control] if control else []
        arguments += ["--options", *options]
        print(" ".join(["python evaluate.py", *arguments]), flush=True)
        if evaluate_main(arguments) != 0:
            raise SystemExit("quickstart: the evaluation failed, see above")
        names = {name: f"{name}-{control}" if control else name for name in TASKS}
        found[control] = {
            name: read_results(output / "evaluation" / of / "results.json")
            for name, of in names.items()
        }
    return found


def best_constant_box(boxes: list[tuple], held_out: list[dict]) -> tuple[str, float]:
    """Return the one box, of those of training, that most held-out questions would take, as text, and their share."""
    from minigpt4.datasets.instructions.dataset import box_text
    from minigpt4.datasets.instructions.records import Box
    from minigpt4.evaluation.metrics import box_accuracy
    from minigpt4.quickstart.instructions import SIZE

    truth, sizes = [item["reference"]["box"] for item in held_out], [SIZE] * len(held_out)
    shares = {}
    for text in {box_text(Box(*box), SIZE) for box in boxes}:
        shares[text] = box_accuracy([text] * len(truth), truth, sizes)["accuracy"]
    return max(shares.items(), key=lambda pair: pair[1])


def random_box(boxes: list[tuple], held_out: list[dict]) -> float:
    """Return the share of held-out questions that a box of training, drawn at random for each, would answer."""
    import random

    from minigpt4.evaluation.metrics import box_iou

    draw = random.Random(0)
    hits = []
    for item in held_out * 20:
        pair = _corners(item["reference"]["box"]), _corners(draw.choice(boxes))
        hits.append(box_iou(*pair, plus_one=True) > 0.5)
    return mean(hits)


def _corners(box: Sequence[float]) -> tuple[float, ...]:
    """Return (x0, y0, x1, y1) of a box (x0, y0, width, height)."""
    return (box[0], box[1], box[0] + box[2], box[1] + box[3])


def best_constant_answers(held_out: list[dict]) -> float:
    """Return the share of items right if each group's most common answer were given to all of it."""
    groups: dict[str, Counter] = {}
    for item in held_out:
        said = item["reference"]
        groups.setdefault(item["group"], Counter())[said if isinstance(said, str) else said[0]] += 1
    return sum(counter.most_common(1)[0][1] for counter in groups.values()) / len(held_out)


def report(data: Path, found: dict[str, dict[str, dict]]) -> dict:
    """Return the figures of the three tasks beside their controls, and an answer of each."""
    instances = json.loads((data / "refcoco/instances.json").read_text())
    last = max(len(instances["images"]) - len(found[""]["refcoco"]["items"]), 1)  # of training
    boxes = [tuple(row["bbox"]) for row in instances["annotations"] if row["image_id"] <= last]
    rows, examples = {}, {}
    for name, task in TASKS.items():
        results = found[""][name]
        items, key = results["items"], results["headline"]
        rows[task] = {"questions": len(items), "accuracy": results["metrics"][key]}
        rows[task]["blank"] = found[CONTROL][name]["metrics"][key]["value"]
        if name == "refcoco":
            text, rows[task]["best_constant"] = best_constant_box(boxes, items)
            rows[task] |= {"constant": text, "random": random_box(boxes, items)}
            rows[task]["mean_iou"] = results["metrics"]["mean_iou"]["value"]
        else:
            rows[task]["best_constant"] = best_constant_answers(items)
        kinds = {
            group: metric["value"]
            for group, metric in results["metrics"].items()
            if group.endswith(f"/{key}")
        }
        rows[task]["groups"] = kinds
        examples[task] = {
            field: items[0][field] for field in ("images", "question", "answer", "reference")
        }
    return {"tasks": rows, "examples": examples}


def table(figures: dict) -> str:
    """Return the figures as lines of text."""
    lines = [
        f"{'held-out images':18}{'questions':>10}{'right':>8}{'95 % interval':>18}{'blank':>8}{'constant':>10}"
    ]
    for task, row in figures["tasks"].items():
        right = row["accuracy"]
        interval = f"{right['low']:.2f} to {right['high']:.2f}"
        counts = f"{row['questions']:>10}{right['value']:>8.2f}{interval:>18}"
        lines.append(f"{task:18}{counts}{row['blank']:>8.2f}{row['best_constant']:>10.2f}")
    refer = figures["tasks"]["[refer]"]
    lines.append(
        f"[refer]: IoU > 0.5; mean IoU {refer['mean_iou']:.2f}; a random box of training {refer['random']:.2f}"
    )
    for example in figures["examples"].values():
        truth = example["reference"]
        lines.append(
            f"\n{example['images'][0]}\n  {example['question']}\n  {example['answer']}   (right: {truth})"
        )
    return "\n".join(lines)


def quickstart(args: argparse.Namespace) -> None:
    """Prepare, train, evaluate; print one table and an answer of each task."""
    seconds, start = {}, time.perf_counter()

    def phase(name: str) -> None:
        seconds[name] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    data = prepare(args.cache_root)
    phase("preparation")
    if args.prepare:
        print(f"annotation files and images are in {data}")
        return
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    options = [*args.options, *([f"env.cache_root={args.cache_root}"] if args.cache_root else [])]
    checkpoint = train(args, options)
    phase("training")
    options.append(f"model.ckpt={checkpoint}")
    figures = report(data, evaluate(args.output, options))
    phase("evaluation")
    (args.output / "report.json").write_text(
        json.dumps({**figures, "seconds": seconds}, indent=2) + "\n"
    )
    print(
        f"\n{table(figures)}\n\nseconds: {seconds}\nresults: {args.output}/report.json, {args.output}/evaluation"
    )
    print(f"chat: python demo.py --cfg-path {EVALUATION} --options {' '.join(options)}")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the program with this command line."""
    return run_program(quickstart, parse_args(argv))


if __name__ == "__main__":
    require_environment()
    sys.exit(main())
