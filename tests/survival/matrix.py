"""Faults on real runs: each trains the embedded default for a few steps in a program of its own.

A fault passes if the run ended within its time, with the exit status, the message and the counts of lost samples that
the fault declares, without a bare traceback, and ran nothing that it was given.
"""

import os
import re
import subprocess
import sys
import threading
import time
from itertools import groupby
from pathlib import Path

from tests.survival.damage import Place
from tests.survival.fault import Fault
from tests.survival.kill import CONFIGS
from tests.survival.processes import ROOT, kill_all, start, torchrun

SETTINGS = {
    "run.max_epoch": 1,
    "run.iters_per_epoch": 4,
    "run.batch_size_train": 2,
    "run.num_workers": 0,
    "run.warmup_steps": 2,
    "run.log_freq": 1,
    "run.device": "cpu",
}
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
# as root, permissions hold only without these
UNPRIVILEGED = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
# torchrun's own traceback names the rank that failed; ours must not be there
LAUNCHERS_TRACEBACK = r"Traceback \(most recent call last\):\n(?: .*\n)+torch\.distributed\.elastic\.\S*(?:Error|Exception)"


class Matrix:
    """Runs faults below one folder; `outcome` may be called from several threads.

    `address`: of the web server; `limit`: seconds that a run may take; `cache_root`: of the embedded default.
    """

    def __init__(
        self, folder: Path, address: str, limit: int, cache_root: str | Path | None = None
    ):
        from minigpt4.quickstart.prepare import prepare

        self.folder, self.address, self.limit = folder, address, limit
        self.cache_root = prepare(cache_root).parent
        self._lock, self._finished = threading.Lock(), None

    def finished(self) -> Path:
        """Return the output folder of a run that ended well, with a checkpoint within its epoch; made once."""
        with self._lock:
            if not self._finished:
                fault = Fault("", "finished run", lost={}, settings={"run.save_every_iters": 2})
                place = self._place(fault)
                if wrong := self._judged(fault, place, *self._run(fault, place))["wrong"]:
                    raise RuntimeError(f"the run that others resume: {wrong}; see {place.folder}")
                self._finished = place.folder / "out"
        return self._finished

    def outcome(self, fault: Fault) -> dict:
        """Return {"group", "name", "exit", "message", "lost", "seconds", "wrong": what differs from the fault's}."""
        place = self._place(fault)
        return self._judged(fault, place, *self._run(fault, place))

    def _place(self, fault):
        name = re.sub(r"\W+", "_", f"{fault.group}_{fault.name}").strip("_")
        (self.folder / name).mkdir(parents=True)
        return Place(self.folder / name, self.address, self.finished)

    def _run(self, fault, place):
        """Return (exit code or None for a run that was ended by us, seconds)."""
        command = [sys.executable, fault.program]
        if fault.ranks > 1:
            command = torchrun(*fault.launcher, fault.program, ranks=fault.ranks)
        command += ["--cfg-path", self._configuration(fault, place)]
        if fault.unprivileged and os.geteuid() == 0:
            command = [*UNPRIVILEGED, *command]
        begin = time.perf_counter()
        process = start(command, place.folder / "said.txt")
        if fault.act:
            threading.Thread(target=fault.act, args=(process, place), daemon=True).start()
        try:
            code = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            kill_all(process)
            code = None
        return code, time.perf_counter() - begin

    def _configuration(self, fault, place):
        """Return the path of a YAML file: that of the stage, tiny, and what the fault changes."""
        from omegaconf import OmegaConf

        cfg = OmegaConf.load(ROOT / CONFIGS[f"stage{fault.stage}"])
        fixed = {
            "run.output_dir": str(place.folder / "out"),
            "env.cache_root": str(self.cache_root),
        }
        if fault.stage == 1:
            del cfg.datasets.cc_sbu
        else:
            fixed["model.ckpt"] = ""
        made = fault.make(place)
        for key, value in {**SETTINGS, **fixed, **made, **fault.settings}.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        OmegaConf.save(cfg, place.folder / "config.yaml")
        return place.folder / "config.yaml"

    def _judged(self, fault, place, code, seconds):
        text = (place.folder / "said.txt").read_text(errors="replace")
        logs = text + "".join(path.read_text() for path in place.folder.glob("out/*/log.txt"))
        line = re.search(rf"^.*?(?:{fault.says})", text, flags=re.M)
        lost = counted(text)
        wrong = {
            f"not ended after {self.limit} s": code is None,
            f"exit code {code}, not {fault.code}": code not in (None, fault.code),
            f"does not say '{fault.says}'": line is None,
            f"lost {lost}, not {fault.lost}": fault.lost is not None and lost != fault.lost,
            "more than one problem": fault.code == 2
            and "1 problem in the configuration" not in text,
            "a bare traceback": "Traceback (most" in re.sub(LAUNCHERS_TRACEBACK, "", text),
            f"says '{fault.never}'": bool(re.search(fault.never, logs)),
            "ran or wrote what it was given": any(self.folder.rglob("executed"))
            or any(self.folder.rglob("escaped*")),
        }
        wrong |= {f"does not say '{also}'": not re.search(also, text) for also in fault.also}
        return {
            "group": fault.group,
            "name": fault.name,
            "exit": code,
            "message": self._shortened(line[0]) if line else "",
            "lost": lost,
            "seconds": round(seconds, 1),
            "wrong": [what for what, is_so in wrong.items() if is_so],
        }

    def _shortened(self, line, length=170):
        """Return a line without its time and without what only this machine has."""
        line = re.sub(r"^[\d-]+ [\d:,]+ (\[\w+\] )?", "", line.strip())
        line = re.sub(rf"(/[^\s'\"(]*)?{re.escape(self.folder.name)}/[^\s/'\"]+", "…", line)
        line = re.sub(r"\[?127\.0\.0\.1\]?:\d+", "…", line.replace(self.address, "http://…"))
        line = line.replace(str(self.cache_root), "…").replace(str(Path.home()), "~")
        return line if len(line) <= length else line[: length - 1] + "…"


def counted(text: str) -> dict[str, int] | None:
    """Return {reason: samples} of the table at the end of a run, None if there is none."""
    tables = re.findall(r"^\w+: \d+ of \d+ samples skipped(?: \((.*)\))?$", text, flags=re.M)
    if not tables:
        return None
    return {reason: int(number) for number, reason in re.findall(r"(\d+) (\w+)", " ".join(tables))}


def write_section(path: Path, outcomes: list[dict]) -> None:
    """Replace what stands between the two marks of a document by the table.

    Raises ValueError for a document without the marks.
    """
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path}: has no {BEGIN} .. {END}")
    path.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}", encoding="utf-8")


def table(outcomes: list[dict]) -> str:
    """Return the outcomes as Markdown, one table a group."""
    parts = []
    for group, rows in groupby(outcomes, key=lambda each: each["group"]):
        lines = [
            f"**{group}**",
            "",
            "| what | the run | message | samples lost | s |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            did = "continues to its end" if row["exit"] == 0 else f"ends, exit code {row['exit']}"
            lost = (
                "–"
                if row["lost"] is None
                else ", ".join(f"{n} {why}" for why, n in row["lost"].items()) or "none"
            )
            message = row["message"].replace("|", "\\|").replace("`", "'")
            lines.append(f"| {row['name']} | {did} | `{message}` | {lost} | {row['seconds']:.0f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
