"""Programs in processes of their own: measurements, and training on several ranks, which is ended to the last one."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def measure(command, *options, is_shown=False):
    """Return the figures of ``python -m benchmarks command``, run in a process of its own; prints how long it took.

    `is_shown`: what it prints is printed too.

    Raises RuntimeError with what it said if it ends without figures.
    """
    line, start = " ".join([command, *options]), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        words = [sys.executable, "-m", "benchmarks", command, *options, "--json", str(path)]
        result = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if not path.is_file():
            raise RuntimeError(f"python -m benchmarks {line} measured nothing:\n{result.stdout[-3000:]}")
        print(result.stdout if is_shown else "", end="")
        print(f"{line}: {time.perf_counter() - start:.0f} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))


def start(command, output):
    """Return the started program, in the repository's folder, with what it says going to the file `output`."""
    with open(output, "ab") as file:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def torchrun(*arguments, ranks=2):
    """Return the command that starts a program of several ranks on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]


def start_training(arguments, output, ranks=2, launcher=()):
    """Return the started `torchrun train.py` with what it says going to the file `output`."""
    return start(torchrun(*launcher, "train.py", *arguments, ranks=ranks), output)


def children(pid):
    """Return the process ids below `pid`, nearest first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def kill(*pids):
    """Send SIGKILL to processes that may have ended."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_all(process):
    """End a program and everything below it at once, as a power failure does."""
    kill(process.pid, *children(process.pid))
    process.wait()
