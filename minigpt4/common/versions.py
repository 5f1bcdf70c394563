"""What a run depends on besides its settings: versions of libraries, the git commit, the machine."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that results depend on."""
    from minigpt4 import __version__

    found = {"python": platform.python_version(), "minigpt4": __version__}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


def is_installed(name: str) -> bool:
    """Return whether a package can be imported; a mere folder of its name, such as ./wandb, has no origin."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


@lru_cache
def git_commit() -> str | None:
    """Return the commit of this package's git clone, followed by "-dirty" if it has changes; None without a clone."""
    root = Path(__file__).resolve().parents[2]
    # git itself would also find the clone of another project above an installed package
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    command += ["--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """Return the system, processor, memory and GPUs of this machine, as plain values."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
