"""A separate environment for an evaluation harness on top of this one, so that torch is not installed again.

python -m tests.evaluation.harnesses.environment lmms-eval      (make lmms-eval)
python -m tests.evaluation.harnesses.environment vlmevalkit     (make vlmevalkit)

Each becomes a folder build/NAME, made once for each content of NAME.txt and with this checkout installed.
"""

import os
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from minigpt4.common.lock import locked

HERE, ROOT = Path(__file__).parent, Path(__file__).resolve().parents[3]
HARNESSES = ("lmms-eval", "vlmevalkit")


def make_environment(name, folder=None):
    """Return the Python of the environment, which is created if necessary. Raises RuntimeError, InUseError."""
    folder = Path(folder or ROOT / "build" / name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin" / "python", folder / "installed"
    requirements = HERE / f"{name}.txt"
    wanted = sha256(requirements.read_bytes() + sys.prefix.encode()).hexdigest()
    with locked(folder.with_name(f"{name} environment")):
        if not done.is_file() or done.read_text() != wanted:
            _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder))
            # packages that it lacks are looked up in this environment
            paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
            site = Path(
                _run(
                    str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
                ).strip()
            )
            (site / "shared.pth").write_text("\n".join(paths) + "\n")
            alone, others = _split(requirements)
            _pip(python, "--no-deps", *alone)
            _pip(python, *others)
            done.write_text(wanted)
        # the current checkout: its entry points, and its code through a link
        _pip(python, "--no-deps", "--editable", str(ROOT))
    return python


def _split(requirements):
    """Return (packages to install without dependencies, all others) of a requirements file."""
    lines = [
        line.strip()
        for line in requirements.read_text().splitlines()
        if line.strip() and line[0] != "#"
    ]
    alone = [line.removesuffix("--no-deps").strip() for line in lines if line.endswith("--no-deps")]
    return alone, [line for line in lines if not line.endswith("--no-deps")]


def _pip(python, *packages):
    options = (
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-compile",
        "--disable-pip-version-check",
    )
    _run(sys.executable, "-m", "pip", "--python", str(python), *options, *packages)


def _run(*command):
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"}
    )
    if result.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
        )
    return result.stdout


def registry_is_out_of_reach():
    """Return pip's message if the package registry cannot be reached, else ""."""
    with TemporaryDirectory() as folder:
        options = ("--no-deps", "--retries", "0", "--timeout", "20", "--quiet", "--dest", folder)
        probe = [sys.executable, "-m", "pip", "download", *options, "sty"]
        result = subprocess.run(probe, capture_output=True, text=True)
    return result.stderr.strip().splitlines()[-1] if result.returncode else ""


if __name__ == "__main__":
    if sys.argv[1:] not in [[name] for name in HARNESSES]:
        sys.exit(f"give one of {', '.join(HARNESSES)}")
    print(make_environment(sys.argv[1]))
