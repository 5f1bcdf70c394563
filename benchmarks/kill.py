"""Training is killed at random moments, gone on with by the same command, and compared with the run that was not.

Two ranks with workers train the embedded default: stage 1 from two sources with broken shards and images, stage 2
from a folder. A moment is a random step and a random part of it; half of the kills end everything at once, half one
rank. Compared bit by bit: weights, optimizer, the loss of every step, the lines of every epoch, the counts of skipped
samples. With --saving: a process is killed again and again while it saves, and the file is read.
"""

import hashlib
import io
import json
import multiprocessing
import random
import re
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import machine
from benchmarks.processes import children, kill, kill_all, start_training

HELP = "kill training at random moments and go on; with --saving: kill a process while it saves"
CONFIGS = {
    "stage1": "train_configs/embedded_stage1_pretrain.yaml",
    "stage2": "train_configs/embedded_stage2_finetune.yaml",
}
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


def add_arguments(parser):
    parser.add_argument("--runs", type=int, default=20, help="killed runs a stage (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a temporary folder)")
    parser.add_argument("--cache-root", help="of the embedded default, as for quickstart")
    parser.add_argument("--saving", action="store_true", help="only kill a process while it saves")
    parser.add_argument("--rounds", type=int, default=50, help="of --saving (default: %(default)s)")


def run(args):
    if args.saving:
        return kill_while_saving(args.rounds, args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        work = Trials(args.folder or Path(scratch), args.cache_root, random.Random(args.seed))
        found = {stage: work.stage(stage, args.runs) for stage in args.stages}
    equal = {stage: sum(not trial["differs"] for trial in trials) for stage, trials in found.items()}
    for stage, trials in found.items():
        kills = sum(trial["kills"] for trial in trials)
        print(f"{stage}: {equal[stage]} of {args.runs} killed runs equal the uninterrupted one ({kills} kills)")
    passed = all(number == args.runs for number in equal.values())
    return {"trials": found, "equal": equal, "passed": passed, **machine.description()}


class Trials:
    """Runs of both stages below a folder; all draw their moments from one generator."""

    def __init__(self, folder, cache_root, rng):
        from minigpt4.quickstart.prepare import data_folder, prepare

        self.folder, self.rng = Path(folder), rng
        self.options = [*SETTINGS, *([f"env.cache_root={cache_root}"] if cache_root else [])]
        data = data_folder(prepare(cache_root))
        self.storages = {name: damaged_shards(data / name, self.folder / name) for name in ("laion", "cc_sbu")}
        self.whole = {}

    def stage(self, stage, runs):
        """Return a list of {"kills", "differs"}, one a killed run, after the uninterrupted one."""
        if stage == "stage2" and "stage1" not in self.whole:
            self.uninterrupted("stage1")
        self.uninterrupted(stage)
        trials = []
        for number in range(runs):
            folder = self.folder / f"{stage}-{number}"
            kills = self.killed(stage, folder)
            differs = [key for key, value in outcome(folder).items() if value != self.whole[stage][key]]
            trials.append({"kills": kills, "differs": differs})
            print(f"{stage} run {number}: {kills} kills, {'DIFFERS in ' + ', '.join(differs) if differs else 'equal'}")
            if not differs:
                shutil.rmtree(folder)
        return trials

    def uninterrupted(self, stage):
        folder = self.folder / f"{stage}-whole"
        start = time.perf_counter()
        process = self.start(stage, folder)
        if process.wait() != 0:
            raise RuntimeError(f"{stage} does not train:\n{(folder / 'said.txt').read_text()[-3000:]}")
        self.whole[stage] = outcome(folder)
        print(f"{stage} uninterrupted: {time.perf_counter() - start:.0f} s, {json.dumps(self.whole[stage]['counts'])}")

    def start(self, stage, folder):
        folder.mkdir(parents=True, exist_ok=True)
        options = [*self.options, f"run.output_dir={folder}"]
        if stage == "stage1":
            options += [f"datasets.{name}.build_info.storage={place}" for name, place in self.storages.items()]
        else:
            options.append(f"model.ckpt={newest(self.folder / 'stage1-whole')}")
        arguments = ["--cfg-path", CONFIGS[stage], "--resume", "auto", "--options", *options]
        return start_training(arguments, folder / "said.txt")

    def killed(self, stage, folder):
        """Train to the end through at least one kill; return how many there were."""
        kills, target = 0, self.rng.randrange(EPOCHS * STEPS)
        while True:
            process = self.start(stage, folder)
            if self.wait_for(process, folder, target):
                time.sleep(self.rng.uniform(0, 0.5))
            if process.poll() is None:
                self.end(process)
                kills += 1
                target = self.rng.randrange(target, EPOCHS * STEPS * 2)  # beyond the last step: no kill any more
            elif process.returncode == 0:
                return kills
            else:
                raise RuntimeError(f"{stage} cannot go on:\n{(folder / 'said.txt').read_text()[-3000:]}")

    @staticmethod
    def wait_for(process, folder, step):
        """Return whether `step` was made before the process ended."""
        while process.poll() is None:
            if step in losses(folder):
                return True
            time.sleep(0.02)
        return False

    def end(self, process):
        ranks = [pid for pid in children(process.pid) if children(pid)]
        if ranks and self.rng.random() < 0.5:
            kill(self.rng.choice(ranks))
            process.wait()
        else:
            kill_all(process)


def newest(folder):
    return max(folder.glob("*/checkpoint_?.pth"))


def losses(folder):
    """Return {step: the losses written for it} of a run that may be at work."""
    found = {}
    for path in folder.glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                found.setdefault(record["step"], set()).add((record["loss"], record["lr"], record["samples"]))
    return found


def outcome(folder):
    """Return all that two runs are compared by. A step that was made twice has one loss, or the runs differ."""
    import torch

    checkpoint = newest(folder)  # one killed before its first checkpoint began anew, in another folder
    state = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()
    moments = [value for moment in state["optimizer"]["state"].values() for value in moment.values()]
    for tensor in [*state["model"].values(), *moments]:
        digest.update(tensor.numpy().tobytes())
    counts = re.findall(r"^(\w+: \d+ of \d+ samples skipped.*)$", (folder / "said.txt").read_text(), flags=re.M)
    return {
        "weights": digest.hexdigest(),
        "losses": losses(folder),
        "epochs": re.findall(r'^\{"train.*\}$', checkpoint.with_name("log.txt").read_text(), flags=re.M),
        "counts": sorted(set(counts)),  # a run that is killed after its last words says them again
    }


def damaged_shards(source, target, shards=5, samples=24):
    """Return a pattern of small copies of shards: one is no tar, one is cut off, in one every fifth image is bad."""
    target.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        buffer = io.BytesIO()
        with tarfile.open(source / f"{shard:05}.tar") as whole, tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, member in zip(range(3 * samples), whole, strict=False):
                data = whole.extractfile(member).read()
                if shard == 3 and member.name.endswith(".jpg") and number % 5 == 0:
                    data = b"no image"
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        content = {1: b"no tar", 2: buffer.getvalue()[: len(buffer.getvalue()) // 2]}.get(shard, buffer.getvalue())
        (target / f"{shard:05}.tar").write_bytes(content)
    return f"{target}/{{00000..{shards - 1:05}}}.tar"


# ---------------------------------------- killed while saving


def kill_while_saving(rounds, seed):
    """Print and return how many files could not be read, of ours and of a plain torch.save."""
    import torch

    torch.set_num_threads(1)  # a fork of a process with a pool of threads would wait for them for ever
    rng, found = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, save in (("ours", _save), ("torch.save to the same file", _save_directly)):
            found[name] = _unreadable(Path(scratch) / f"{len(found)}.pth", save, rounds, rng)
            print(f"{name}: {found[name]} of {rounds} checkpoints unreadable after a kill")
    return {"unreadable": found, "passed": found["ours"] == 0, **machine.description()}


def _unreadable(path, save, rounds, rng):
    from minigpt4.common.checkpoint import CheckpointError, load_checkpoint

    unreadable = 0
    for _ in range(rounds):
        process = multiprocessing.get_context("fork").Process(target=_save_for_ever, args=(path, save))
        process.start()
        while not path.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0.02, 0.3))
        process.kill()
        process.join()
        try:
            weights = load_checkpoint(path, "benchmark")[0]["model"]["w"]
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
        save(path, {"model": {"w": weights}, "optimizer": {}, "config": {}, "scaler": None, "epoch": 0})


def _save(path, state):
    from minigpt4.common.checkpoint import save_checkpoint

    save_checkpoint(path, state)


def _save_directly(path, state):
    import torch

    torch.save(state, path)
