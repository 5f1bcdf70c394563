"""Run the whole recipe at small scale: `make quickstart`, or `python -m minigpt4.quickstart`.

Prepares data and language model, trains both stages with train.py, then evaluates on held-out images and on
colour-shape pairs that training never shows. Writes to --output: report.json, answers.jsonl, accuracy.png, loss.png,
pictures.png, the folder evaluation with the results of the drawn benchmarks, and the checkpoint.pth of stage 2.
Results that already exist are reused.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minigpt4.common.config_paths import find_path
from minigpt4.quickstart.arguments import add_config_options, cache_root_option

# These paths are found from any working directory, see config_paths.find_path.
STAGES = {
    "stage1": "train_configs/embedded_stage1_pretrain.yaml",
    "stage2": "train_configs/embedded_stage2_finetune.yaml",
}
# Validation halfway through and at the end of each stage, on images of its own: the trained weights do not depend on it.
_VALIDATION = "${env.cache_root}/embedded/validation-v3"
VALIDATION = {
    "stage1": [f"datasets.laion.val.storage={_VALIDATION}/laion/*.tar", "run.eval_every_iters=185"],
    "stage2": [
        f"datasets.cc_sbu_align.val.storage={_VALIDATION}/cc_sbu_align",
        "run.eval_every_iters=155",
    ],
}
EVALUATION = "eval_configs/embedded_eval.yaml"
# Environment of this program and of the trainings it starts, read at process start. What the user has set takes precedence.
ENVIRONMENT = {
    # OpenMP threads that spin for long slow down two busy cores many times over; threads that do not spin at all
    # slow down two idle ones by a tenth (stage 2) to a quarter (stage 1).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
    # By default glibc returns the pages of freed tensors to the system; faulting them in again costs a tenth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
WEIGHTS = Path(__file__).parent / "weights/manifest.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"))
    parser.add_argument(
        "--seed", type=int, default=42, help="of both stages (default: %(default)s)"
    )
    parser.add_argument(
        "--images",
        "--pictures",  # its former name
        type=int,
        default=200,
        metavar="N",
        help="held-out images to evaluate (default: %(default)s)",
    )
    add_config_options(parser, "train.py, both stages")
    return parser.parse_args(argv)


class Quickstart:
    """One run: its phases in order, each timed, and skipped if its result already exists."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output = args.output.resolve()
        self.options = cache_root_option(args)
        self.seconds = {}

    def run(self) -> dict:
        """Run all phases and return the report."""
        from minigpt4.quickstart.prepare import prepare

        self.output.mkdir(parents=True, exist_ok=True)
        self._timed("prepare", prepare, self.args.cache_root)
        checkpoints = {}
        for stage in STAGES:
            checkpoints[stage] = self._timed(stage, self.train, stage, checkpoints.get("stage1"))
        report = self._timed("evaluation", self.evaluate, checkpoints)
        return self.write(report, checkpoints)

    def _timed(self, phase: str, function: Callable, *args: object) -> object:
        print(f"\n=== {phase} ===", flush=True)
        start = time.perf_counter()
        result = function(*args)
        self.seconds[phase] = round(time.perf_counter() - start, 1)
        return result

    # training

    def train(self, stage: str, start_from: Path | None) -> Path:
        """Return the last checkpoint of `stage`, trained unless one with the same settings exists.

        `start_from`: the checkpoint to start from, if any.
        """
        from minigpt4.quickstart.prepare import DATA_VERSION

        folder = self.output / stage
        options = [*self.options, f"run.output_dir={folder}", f"run.seed={self.args.seed}"]
        options += ["run.valid_splits=[val]", *VALIDATION[stage], *self.args.options]
        if start_from:
            options.append(f"model.ckpt={start_from}")
        depends_on = WEIGHTS.read_bytes() + repr(DATA_VERSION).encode()
        return train_once(STAGES[stage], folder, options, depends_on)

    # evaluation

    def evaluate(self, checkpoints: dict) -> dict:
        """Return the report and write answers.jsonl; a report on the same checkpoints and images is reused."""
        path = self.output / "report.json"
        evaluated = {stage: str(checkpoint) for stage, checkpoint in checkpoints.items()}
        evaluated["pictures"] = self.args.images
        if path.is_file():
            report = json.loads(path.read_text())
            if report.get("evaluated") == evaluated:
                print(f"{path} is there")
                return report
        import minigpt4
        from minigpt4.quickstart.report import measure

        options = [*self.options, f"model.ckpt={checkpoints['stage2']}"]
        chat, conv = minigpt4.load(EVALUATION, options)
        results = self.output / "evaluation"
        # those present belong to other checkpoints or another number of images
        shutil.rmtree(results, ignore_errors=True)
        report, answers = measure(chat, conv, checkpoints, self.args.images, results)
        with open(self.output / "answers.jsonl", "w") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
        return {"evaluated": evaluated, **report}

    # report

    def write(self, report: dict, checkpoints: dict) -> dict:
        """Add losses and seconds to the report; write it with figures and checkpoint, and return it."""
        from minigpt4.quickstart import figures
        from minigpt4.runners.curves import draw_runs, read_metrics

        metrics = {
            stage: read_metrics(checkpoint.parent) for stage, checkpoint in checkpoints.items()
        }
        first_and_last = {}
        for stage, of_stage in metrics.items():
            losses = [record["loss"] for record in of_stage.steps]
            first_and_last[stage] = {
                "first": round(losses[0], 4),
                "last": round(sum(losses[-10:]) / len(losses[-10:]), 4),
            }
        seconds = self.seconds | {"total": round(sum(self.seconds.values()), 1)}
        # a reused report keeps its own seconds
        report = {"seconds": seconds} | report | {"seed": self.args.seed, "loss": first_and_last}
        (self.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        shutil.copyfile(checkpoints["stage2"], self.output / "checkpoint.pth")
        (self.output / "loss.png").write_bytes(draw_runs(metrics))
        figures.draw_accuracies(report, self.output / "accuracy.png")
        answers = [
            json.loads(line) for line in (self.output / "answers.jsonl").read_bytes().splitlines()
        ]
        figures.draw_images(answers, self.output / "pictures.png")
        return report

    def say(self, report: dict) -> None:
        """Print the main figures of the report and what to do next."""
        print(f"\nThe first held-out image, described: {report['example']['description']}\n")
        for name in ("held_out", "best_constant"):
            print(f"{name:14}", {k: round(v, 2) for k, v in report[name].items()})
        print(f"{'questions':14}", {k: round(v, 2) for k, v in report["questions"].items()})
        print(f"{'seconds':14}", report["seconds"])
        options = " ".join([f"model.ckpt={self.output / 'checkpoint.pth'}", *self.options])
        print(
            f"""
Results: {self.output}/report.json, accuracy.png, pictures.png, loss.png, answers.jsonl, checkpoint.pth
Next:
  ask about images     python evaluate.py --cfg-path {EVALUATION} --images FOLDER --options {options}
  train with your own    docs/embedded.md, "Your own images"
  train the real model   README.md, "Train the real model\""""
        )


def train_once(cfg_path: str, folder: Path, options: list[str], depends_on: bytes) -> Path:
    """Train into `folder`, unless a training with the same settings has finished there; return its last checkpoint.

    `depends_on`: what the result depends on apart from the YAML file and the options. Raises SystemExit if training fails.
    """
    from minigpt4.runners.run_folder import checkpoints

    done = folder / "finished.json"
    settings = Path(find_path(cfg_path)).read_bytes() + depends_on + repr(options).encode()
    fingerprint = hashlib.sha256(settings).hexdigest()
    if done.is_file():
        state = json.loads(done.read_text())
        if state["fingerprint"] == fingerprint:
            print(f"{folder.name}: {state['checkpoint']} is there; remove {done} to train again")
            return Path(state["checkpoint"])
    command = [
        sys.executable,
        "-m",
        "minigpt4.train",
        "--cfg-path",
        cfg_path,
        "--options",
        *options,
    ]
    print(" ".join(command), flush=True)
    if subprocess.run(command, env={**ENVIRONMENT, **os.environ}).returncode != 0:
        raise SystemExit(f"quickstart: {folder.name} failed, see above")
    # earlier runs may lie beside the one that has just ended
    newest = max(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    checkpoint = checkpoints(newest.parent)[0]
    done.write_text(json.dumps({"fingerprint": fingerprint, "checkpoint": str(checkpoint)}))
    return checkpoint


def main(argv: list[str] | None = None) -> None:
    """Run everything and print a summary."""
    quickstart = Quickstart(parse_args(argv))
    quickstart.say(quickstart.run())


def require_environment() -> None:
    """Restart this program with ENVIRONMENT, unless it is set already; to be called before large imports."""
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**ENVIRONMENT, **os.environ})


if __name__ == "__main__":
    require_environment()
    main()
