"""Train a small MiniGPT-v2 on the drawn world: `make quickstart-v2`, or `python -m minigpt4.quickstart.v2`.

Draws images and writes them with annotation files in the official formats (instructions.py), trains `minigpt_v2` on them
with train.py, first on captions alone, then on all tasks, and evaluates [refer], [identify] and [vqa] on held-out
images with evaluate.py, and once more with blank images as a control.
Writes to --output: checkpoint.pth, report.json, and the results of both evaluations. Results that already exist are reused.
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
from minigpt4.quickstart.arguments import add_config_options, cache_root_option
from minigpt4.quickstart.quickstart import require_environment, train_once

FIRST_STAGE = "train_configs/embedded_v2_stage1.yaml"
TRAINING, EVALUATION = "train_configs/embedded_v2.yaml", "eval_configs/embedded_v2_eval.yaml"
WEIGHTS = Path(__file__).parent / "weights/manifest_boxes.json"
# benchmark of evaluate.py: the task that it measures
TASKS = {"refcoco": "[refer]", "identify": "[identify]", "gqa": "[vqa]"}
CONTROL = "blank"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/quickstart_v2"))
    parser.add_argument(
        "--prepare", action="store_true", help="draw the images and fetch the LLM, no more"
    )
    add_config_options(parser, "training and evaluation")
    return parser.parse_args(argv)


def prepare(cache_root: str | None) -> Path:
    """Return the folder of annotation files, images and the initial `llama_proj`; it and the LLM are made if absent."""
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
    """Train both stages, unless that is done; return the copy of the last checkpoint in the output folder."""
    depends_on = WEIGHTS.read_bytes()
    first, second = args.output / "stage1", args.output / "training"
    after_stage1 = train_once(FIRST_STAGE, first, [*options, f"run.output_dir={first}"], depends_on)
    # Stage 2 depends on everything that stage 1 does, which the file name of its checkpoint does not tell.
    depends_on += (first / "finished.json").read_bytes()
    options = [*options, f"model.ckpt={after_stage1}", f"run.output_dir={second}"]
    trained = train_once(TRAINING, second, options, depends_on)
    checkpoint = args.output / "checkpoint.pth"
    if not checkpoint.is_file() or not filecmp.cmp(trained, checkpoint, shallow=False):
        # its results are those of another checkpoint
        shutil.rmtree(args.output / "evaluation", ignore_errors=True)
        shutil.copyfile(trained, checkpoint)
    return checkpoint


def evaluate(output: Path, options: list[str]) -> dict[str, dict[str, dict]]:
    """Run evaluate.py with true and with blank images; return {"": {benchmark: results}, "blank": {benchmark: results}}.

    Raises SystemExit if it fails.
    """
    from minigpt4.evaluate import main as evaluate_main
    from minigpt4.evaluation.results import read_results

    results: dict[str, dict[str, dict]] = {}
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
        results[control] = {}
        for name in TASKS:
            folder = f"{name}-{control}" if control else name
            results[control][name] = read_results(output / "evaluation" / folder / "results.json")
    return results


def best_constant_box(boxes: list[tuple], held_out: list[dict]) -> tuple[str, float]:
    """Return the training box, as text, that is right for most held-out questions, and the share of these."""
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
    """Return the accuracy of answering each held-out question with a training box drawn at random, over 20 draws."""
    import random

    from minigpt4.evaluation.metrics import box_iou

    draw = random.Random(0)
    hits = []
    for item in held_out * 20:
        truth, guess = _corners(item["reference"]["box"]), _corners(draw.choice(boxes))
        hits.append(box_iou(truth, guess, plus_one=True) > 0.5)
    return mean(hits)


def _corners(box: Sequence[float]) -> tuple[float, ...]:
    """Return (x0, y0, x1, y1) of a box (x0, y0, width, height)."""
    return (box[0], box[1], box[0] + box[2], box[1] + box[3])


def best_constant_answers(held_out: list[dict]) -> float:
    """Return the accuracy of giving to every item the most common answer of its group."""
    groups: dict[str, Counter] = {}
    for item in held_out:
        answer = item["reference"]
        if not isinstance(answer, str):
            answer = answer[0]  # one of several right ones
        groups.setdefault(item["group"], Counter())[answer] += 1
    return sum(counter.most_common(1)[0][1] for counter in groups.values()) / len(held_out)


def report(data: Path, results: dict[str, dict[str, dict]]) -> dict:
    """Return the figures of the three tasks beside their controls, and an example of each.

    `data`: the folder that `prepare` returned; `results`: as `evaluate` returns them.
    """
    boxes = _training_boxes(data, num_held_out=len(results[""]["refcoco"]["items"]))
    rows, examples = {}, {}
    for name, task in TASKS.items():
        items, metrics = results[""][name]["items"], results[""][name]["metrics"]
        headline = results[""][name]["headline"]
        row = {"questions": len(items), "accuracy": metrics[headline]}
        row["blank"] = results[CONTROL][name]["metrics"][headline]["value"]
        if name == "refcoco":
            text, row["best_constant"] = best_constant_box(boxes, items)
            row |= {"constant": text, "random": random_box(boxes, items)}
            row["mean_iou"] = metrics["mean_iou"]["value"]
        else:
            row["best_constant"] = best_constant_answers(items)
        of_groups = [group for group in metrics if group.endswith(f"/{headline}")]
        row["groups"] = {group: metrics[group]["value"] for group in of_groups}
        rows[task] = row
        examples[task] = {
            field: items[0][field] for field in ("images", "question", "answer", "reference")
        }
    return {"tasks": rows, "examples": examples}


def _training_boxes(data: Path, num_held_out: int) -> list[tuple]:
    """Return the boxes of all training images. Images are numbered from 1, the held-out ones last."""
    instances = json.loads((data / "refcoco/instances.json").read_text())
    last = max(len(instances["images"]) - num_held_out, 1)
    return [tuple(row["bbox"]) for row in instances["annotations"] if row["image_id"] <= last]


def table(figures: dict) -> str:
    """Return the figures of `report` as text: a line for each task, then the examples."""
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
    """Prepare, train, evaluate; print a table and an example of each task."""
    seconds, start = {}, time.perf_counter()

    def end_of(phase: str) -> None:
        seconds[phase] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    data = prepare(args.cache_root)
    end_of("preparation")
    if args.prepare:
        print(f"annotation files and images are in {data}")
        return
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    options = [*args.options, *cache_root_option(args)]
    checkpoint = train(args, options)
    end_of("training")
    options.append(f"model.ckpt={checkpoint}")
    figures = report(data, evaluate(args.output, options))
    end_of("evaluation")
    (args.output / "report.json").write_text(
        json.dumps({**figures, "seconds": seconds}, indent=2) + "\n"
    )
    print(
        f"\n{table(figures)}\n\nseconds: {seconds}\nresults: {args.output}/report.json, {args.output}/evaluation"
    )
    print(f"chat: python demo.py --cfg-path {EVALUATION} --options {' '.join(options)}")


def main(argv: list[str] | None = None) -> int:
    """Run the program with a command line; return its exit code."""
    return run_program(quickstart, parse_args(argv))


if __name__ == "__main__":
    require_environment()
    sys.exit(main())
