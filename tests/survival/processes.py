"""Programs in processes of their own, among them training on several ranks, which is ended to the last one."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(command: Sequence, output: Path) -> subprocess.Popen:
    """Return the started program, in the repository's folder, with what it says appended to the file `output`."""
    with open(output, "ab") as file:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """Return the command that starts a program of several ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", *arguments]


def start_training(
    arguments: Sequence, output: Path, ranks: int = 2, launcher: Sequence[str] = ()
) -> subprocess.Popen:
    """Return the started `torchrun train.py` with what it says appended to the file `output`."""
    return start(torchrun(*launcher, "train.py", *arguments, ranks=ranks), output)


def children(pid: int) -> list[int]:
    """Return the process ids below `pid`, nearest first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue  # it has ended
    below = [pid]
    for each in below:  # grows while it is walked
        below += [child for child, parent in parents.items() if parent == each]
    return below[1:]


def kill(*pids: int) -> None:
    """Send SIGKILL to processes that may have ended."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_all(process: subprocess.Popen) -> None:
    """End a program and everything below it at once, as a power failure does."""
    kill(process.pid, *children(process.pid))
    process.wait()


def bytes_read() -> int:
    """Return how many bytes this process has read so far, from whatever file."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
