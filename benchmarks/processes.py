"""Programs of several processes: started in a session of their own, and ended to the last one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
