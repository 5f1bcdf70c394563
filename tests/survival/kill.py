"""Training is killed at random moments, resumed by the same command, and compared with the run that was not.

Two ranks with workers train the embedded default: stage 1 from two sources with broken shards and images, stage 2
from a folder. A moment is a random step and a random part of it; half of the kills end everything at once, half one
rank. Compared bit by bit: weights, optimizer, the loss of every step, the lines of every epoch, the counts of skipped
samples. `kill_while_saving`: a process is killed again and again while it saves, and the file is read.
"""

import hashlib
import io
import json
import multiprocessing
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from tests.survival.processes import children, kill, kill_all, start_training

CONFIGS = {
    "stage1": "train_configs/embedded_stage1_pretrain.yaml",
    "stage2": "train_configs/embedded_stage2_finetune.yaml",
}
STAGES = tuple(CONFIGS)
EPOCHS, STEPS, EVERY = 2, 12, 3
SETTINGS = [
    f"run.max_epoch={EPOCHS}",
    f"run.iters_per_epoch={STEPS}",
    f"run.save_every_iters={EVERY}",
    "run.batch_size_train=2",
    "run.num_workers=2",
    "run.warmup_steps=4",
    "run.log_freq=4",
    "run.device=cpu",
]


class Trials:
    """Runs of both stages below a folder; all draw their moments from one generator."""

    def __init__(self, folder: Path, cache_root: str | Path | None, rng: random.Random):
        from minigpt4.quickstart.prepare import data_folder, prepare

        self.folder, self.rng = folder, rng
        self.options = [*SETTINGS, *([f"env.cache_root={cache_root}"] if cache_root else [])]
        data = data_folder(prepare(cache_root))
        self.storages = {
            name: damaged_shards(data / name, self.folder / name) for name in ("laion", "cc_sbu")
        }
        self.whole = {}

    def stage(self, stage: str, runs: int) -> list[dict]:
        """Return a list of {"kills", "differs"}, one a killed run, after the uninterrupted one."""
        if stage == "stage2" and "stage1" not in self.whole:
            self.uninterrupted("stage1")
        self.uninterrupted(stage)
        trials = []
        for number in range(runs):
            folder = self.folder / f"{stage}-{number}"
            kills = self.killed(stage, folder)
            differs = [
                key for key, value in outcome(folder).items() if value != self.whole[stage][key]
            ]
            trials.append({"kills": kills, "differs": differs})
            print(
                f"{stage} run {number}: {kills} kills, {'DIFFERS in ' + ', '.join(differs) if differs else 'equal'}"
            )
            if not differs:
                shutil.rmtree(folder)
        return trials

    def uninterrupted(self, stage: str) -> None:
        """Train without a kill; `whole` then holds the outcome. Raises RuntimeError with the output if it fails."""
        folder = self.folder / f"{stage}-whole"
        start = time.perf_counter()
        process = self.start(stage, folder)
        if process.wait() != 0:
            raise RuntimeError(
                f"{stage} does not train:\n{(folder / 'said.txt').read_text()[-3000:]}"
            )
        self.whole[stage] = outcome(folder)
        print(
            f"{stage} uninterrupted: {time.perf_counter() - start:.0f} s, {json.dumps(self.whole[stage]['counts'])}"
        )

    def start(self, stage: str, folder: Path) -> subprocess.Popen:
        """Return the started training of a stage with its output below `folder`, which it resumes."""
        folder.mkdir(parents=True, exist_ok=True)
        options = [*self.options, f"run.output_dir={folder}"]
        if stage == "stage1":
            options += [
                f"datasets.{name}.build_info.storage={place}"
                for name, place in self.storages.items()
            ]
        else:
            options.append(f"model.ckpt={newest(self.folder / 'stage1-whole')}")
        arguments = ["--cfg-path", CONFIGS[stage], "--resume", "auto", "--options", *options]
        return start_training(arguments, folder / "said.txt")

    def killed(self, stage: str, folder: Path) -> int:
        """Train to the end through at least one kill; return how many there were."""
        kills, target = 0, self.rng.randrange(EPOCHS * STEPS)
        while True:
            process = self.start(stage, folder)
            if self.wait_for(process, folder, target):
                time.sleep(self.rng.uniform(0, 0.5))
            if process.poll() is None:
                self.end(process)
                kills += 1
                # beyond the last step: no kill any more
                target = self.rng.randrange(target, EPOCHS * STEPS * 2)
            elif process.returncode == 0:
                return kills
            else:
                raise RuntimeError(
                    f"{stage} cannot resume:\n{(folder / 'said.txt').read_text()[-3000:]}"
                )

    @staticmethod
    def wait_for(process: subprocess.Popen, folder: Path, step: int) -> bool:
        """Return whether `step` was made before the process ended."""
        while process.poll() is None:
            if step in losses(folder):
                return True
            time.sleep(0.02)
        return False

    def end(self, process: subprocess.Popen) -> None:
        """Kill everything at once or, as often, one rank alone."""
        ranks = [pid for pid in children(process.pid) if children(pid)]
        if ranks and self.rng.random() < 0.5:
            kill(self.rng.choice(ranks))
            process.wait()
        else:
            kill_all(process)


def newest(folder: Path) -> Path:
    """Return the last checkpoint of an epoch below an output folder."""
    return max(folder.glob("*/checkpoint_?.pth"))


def losses(folder: Path) -> dict[int, set]:
    """Return {step: the losses written for it} of a run that may be at work."""
    found = {}
    for path in folder.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                found.setdefault(record["step"], set()).add(
                    (record["loss"], record["lr"], record["samples"])
                )
    return found


def outcome(folder: Path) -> dict:
    """Return all that two runs are compared by. A step that was made twice has one loss, or the runs differ."""
    import torch

    # one killed before its first checkpoint began anew, in another folder
    checkpoint = newest(folder)
    state = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()
    for tensors in (state["model"], *state["optimizer"]["state"].values()):
        for tensor in tensors.values():
            digest.update(tensor.numpy().tobytes())
    counts = re.findall(
        r"^(\w+: \d+ of \d+ samples skipped.*)$", (folder / "said.txt").read_text(), flags=re.M
    )
    return {
        "weights": digest.hexdigest(),
        "losses": losses(folder),
        "epochs": re.findall(
            r'^\{"train.*\}$', checkpoint.with_name("log.txt").read_text(), flags=re.M
        ),
        "counts": sorted(set(counts)),  # a run that is killed after its last words says them again
    }


def damaged_shards(source: Path, target: Path, shards: int = 5, samples: int = 24) -> str:
    """Return a pattern of small copies of shards: one with a damaged header, one cut off, one with bad images."""
    target.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        buffer = io.BytesIO()
        with (
            tarfile.open(source / f"{shard:05}.tar") as whole,
            tarfile.open(fileobj=buffer, mode="w") as tar,
        ):
            for number, member in zip(range(3 * samples), whole, strict=False):
                data = whole.extractfile(member).read()
                if shard == 3 and member.name.endswith(".jpg") and number % 5 == 0:
                    data = b"no image"
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        content = buffer.getvalue()
        if shard == 1:  # behind the first sample, or it would be refused before the run
            middle = content.index(b"ustar", len(content) // 2)
            content = content[:middle] + b"?" + content[middle + 1 :]
        if shard == 2:
            content = content[: len(content) // 2]
        (target / f"{shard:05}.tar").write_bytes(content)
    return f"{target}/{{00000..{shards - 1:05}}}.tar"


# ---------------------------------------- killed while saving


def kill_while_saving(rounds: int, seed: int) -> dict[str, int]:
    """Return how many of `rounds` files could not be read after a kill, of ours and of a plain torch.save."""
    import torch

    # a fork of a process with a pool of threads would wait for them for ever
    torch.set_num_threads(1)
    rng, ways = random.Random(seed), {"ours": _save, "torch.save to the same file": _save_directly}
    with tempfile.TemporaryDirectory() as scratch:
        return {
            name: _unreadable(Path(scratch) / f"{name}.pth", save, rounds, rng)
            for name, save in ways.items()
        }


def _unreadable(path, save, rounds, rng):
    from minigpt4.common.checkpoint import CheckpointError, load_checkpoint

    unreadable = 0
    for _ in range(rounds):
        process = multiprocessing.get_context("fork").Process(
            target=_save_for_ever, args=(path, save)
        )
        process.start()
        while not path.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
        try:
            weights = load_checkpoint(path, "model.ckpt")[0]["model"]["w"]
            unreadable += not (weights == weights[0]).all()
        except CheckpointError:
            unreadable += 1
    return unreadable


def _save_for_ever(path, save):
    import torch

    value = 0.0
    while True:
        value += 1
        weights = torch.full((1_000_000,), value)
        save(
            path,
            {"model": {"w": weights}, "optimizer": {}, "config": {}, "scaler": None, "epoch": 0},
        )


def _save(path, state):
    from minigpt4.common.checkpoint import save_checkpoint

    save_checkpoint(path, state)


def _save_directly(path, state):
    import torch

    torch.save(state, path)
