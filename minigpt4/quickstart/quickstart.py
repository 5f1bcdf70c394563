"""The whole recipe, small: `make quickstart`, or `python -m minigpt4.quickstart`.

Data and language model, both stages by train.py, then evaluation on images and colour-shape pairs never
seen before. Written to --output: report.json, answers.jsonl, accuracy.png, loss.png, pictures.png,
the folder evaluation with results of the drawn benchmarks and, of stage 2, checkpoint.pth. What is there is used again.
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

# found from any working directory
STAGES = {
    "stage1": "train_configs/embedded_stage1_pretrain.yaml",
    "stage2": "train_configs/embedded_stage2_finetune.yaml",
}
# Held-out loss in the middle and at the end of either stage, of images of their own: what is trained stays the same.
_VALIDATION = "${env.cache_root}/embedded/validation-v3"
VALIDATION = {
    "stage1": [f"datasets.laion.val.storage={_VALIDATION}/laion/*.tar", "run.eval_every_iters=185"],
    "stage2": [
        f"datasets.cc_sbu_align.val.storage={_VALIDATION}/cc_sbu_align",
        "run.eval_every_iters=155",
    ],
}
EVALUATION = "eval_configs/embedded_eval.yaml"
# Of this program and its trainings, read when a process starts; what the user has set goes first.
ENVIRONMENT = {
    # Threads that spin long make two busy cores many times slower, threads that do not spin at all make
    # two free ones slower by a tenth (stage 2) to a quarter (stage 1).
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
    # glibc gives a freed tensor's pages back; faulting them in anew costs a tenth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
WEIGHTS = Path(__file__).parent / "weights/manifest.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument(
        "--cache-root", help="default: env.cache_root of minigpt4/configs/default.yaml"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="more options for train.py, both stages",
    )
    return parser.parse_args(argv)


class Quickstart:
    """One run: phases in order, each timed, each left out when its result is there."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output = args.output.resolve()
        self.options = [f"env.cache_root={args.cache_root}"] if args.cache_root else []
        self.seconds = {}

    def run(self) -> dict:
        """All phases; returns the report."""
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
        """The checkpoint of `stage`, trained unless one of the same settings is there."""
        folder = self.output / stage
        options = [*self.options, f"run.output_dir={folder}", f"run.seed={self.args.seed}"]
        options += ["run.valid_splits=[val]", *VALIDATION[stage], *self.args.options]
        if start_from:
            options.append(f"model.ckpt={start_from}")
        from minigpt4.quickstart.prepare import DATA_VERSION

        return train_once(
            STAGES[stage], folder, options, WEIGHTS.read_bytes() + repr(DATA_VERSION).encode()
        )

    # evaluation

    def evaluate(self, checkpoints: dict) -> dict:
        """The report; answers go to answers.jsonl. One of the same checkpoints is used again."""
        path = self.output / "report.json"
        key = {stage: str(checkpoint) for stage, checkpoint in checkpoints.items()} | {
            "pictures": self.args.images
        }
        if path.is_file() and (report := json.loads(path.read_text())).get("evaluated") == key:
            print(f"{path} is there")
            return report
        import minigpt4
        from minigpt4.quickstart.report import measure

        options = [*self.options, f"model.ckpt={checkpoints['stage2']}"]
        chat, conv = minigpt4.load(EVALUATION, options)
        results = self.output / "evaluation"
        shutil.rmtree(results, ignore_errors=True)  # of other checkpoints, or of fewer images
        report, answers = measure(chat, conv, checkpoints, self.args.images, results)
        with open(self.output / "answers.jsonl", "w") as file:
            file.writelines(json.dumps(answer) + "\n" for answer in answers)
        return {"evaluated": key, **report}

    # report

    def write(self, report: dict, checkpoints: dict) -> dict:
        """The report with losses and seconds, as written to report.json; and the figures."""
        from minigpt4.quickstart import figures
        from minigpt4.runners.curves import draw_runs, read_metrics

        metrics = {
            stage: read_metrics(checkpoint.parent) for stage, checkpoint in checkpoints.items()
        }
        ends = {}
        for stage, of_stage in metrics.items():
            losses = [record["loss"] for record in of_stage.steps]
            ends[stage] = {
                "first": round(losses[0], 4),
                "last": round(sum(losses[-10:]) / len(losses[-10:]), 4),
            }
        seconds = self.seconds | {"total": round(sum(self.seconds.values()), 1)}
        # one reused keeps its seconds
        report = {"seconds": seconds} | report | {"seed": self.args.seed, "loss": ends}
        (self.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        shutil.copyfile(checkpoints["stage2"], self.output / "checkpoint.pth")
        (self.output / "loss.png").write_bytes(draw_runs(metrics))
        figures.draw_accuracies(report, self.output / "accuracy.png")
        answers = [
            json.loads(line) for line in (self.output / "answers.jsonl").read_text().splitlines()
        ]
        figures.draw_images(answers, self.output / "pictures.png")
        return report

    def say(self, report: dict) -> None:
        """Print the outcome and what to do next."""
        print(f"\nThe first held-out image, described: {report['example']['description']}\n")
        for name in ("held_out", "best_constant"):
            print(f"{name:14}", {k: round(v, 2) for k, v in report[name].items()})
        print(f"{'questions':14}", {k: round(v, 2) for k, v in report["questions"].items()})
        print(f"{'seconds':14}", report["seconds"])
        cache = [f"env.cache_root={self.args.cache_root}"] if self.args.cache_root else []
        options = " ".join([f"model.ckpt={self.output / 'checkpoint.pth'}", *cache])
        print(
            f"""
Results: {self.output}/report.json, accuracy.png, pictures.png, loss.png, answers.jsonl, checkpoint.pth
Next:
  ask about images     python evaluate.py --cfg-path {EVALUATION} --images FOLDER --options {options}
  train with your own    docs/embedded.md, "Your own images"
  train the real model   README.md, "Train the real model\""""
        )


def train_once(cfg_path: str, folder: Path, options: list[str], depends_on: bytes) -> Path:
    """Return the last checkpoint of a training into `folder`; made unless one of the same settings is there.

    `depends_on`: what the training depends on beside its file and options. Raises SystemExit if it fails.
    """
    from minigpt4.runners.run_folder import checkpoints

    done = folder / "finished.json"
    settings = Path(find_path(cfg_path)).read_bytes() + depends_on + repr(options).encode()
    fingerprint = hashlib.sha256(settings).hexdigest()
    if done.is_file() and (state := json.loads(done.read_text()))["fingerprint"] == fingerprint:
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
    newest = max(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    (checkpoint, *_) = checkpoints(newest.parent)
    done.write_text(json.dumps({"fingerprint": fingerprint, "checkpoint": str(checkpoint)}))
    return checkpoint


def main(argv: list[str] | None = None) -> None:
    """Run everything and say what came out."""
    quickstart = Quickstart(parse_args(argv))
    quickstart.say(quickstart.run())


def require_environment() -> None:
    """Start this program again in ENVIRONMENT, unless it is set; called before large imports."""
    if not ENVIRONMENT.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, {**ENVIRONMENT, **os.environ})


if __name__ == "__main__":
    require_environment()
    main()
