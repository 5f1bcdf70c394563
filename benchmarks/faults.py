"""What a run does when something is damaged, missing, hostile or ended: one row a fault, of real programs.

Every row trains the embedded default for a few steps in a program of its own, with files that are damaged, a web server
that misbehaves, or a signal at some moment. A row passes if the run ended within its time, with the exit status, the
message and the counts of lost samples that the row declares, without a bare traceback, and ran nothing it was given.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from benchmarks import machine
from benchmarks.damage import Place
from benchmarks.fault_rows import ROWS, Row
from benchmarks.kill import CONFIGS
from benchmarks.processes import ROOT, kill_all, start, torchrun
from benchmarks.web_server import web_server

HELP = "what a run does when something is damaged, missing, hostile or ended; --write puts the table into a document"
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
LAUNCHERS_TRACEBACK = (
    r"Traceback \(most recent call last\):\n(?: .*\n)+torch\.distributed\.elastic\.\S*(?:Error|Exception)"
)


def add_arguments(parser):
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose group or name has one of these in it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at a time (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="seconds a row may take (default: %(default)s)")
    parser.add_argument("--cache-root", help="of the embedded default, as for quickstart")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"replace what stands between {BEGIN} and {END}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work here and remove nothing")


def run(args):
    if args.only and args.write:
        raise SystemExit("--write replaces the whole table: leave out --only")
    wanted = [name.lower() for name in args.only or [""]]
    rows = [row for row in ROWS if any(name in f"{row.group}: {row.name}".lower() for name in wanted)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        with web_server(folder) as address, ThreadPoolExecutor(args.jobs) as pool:
            matrix = Matrix(folder, address, args.limit, args.cache_root)
            try:
                found = list(pool.map(matrix.outcome, rows))
            except BaseException:  # Ctrl-C: the rows at work end, no other begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    wrong = [each for each in found if each["wrong"]]
    print(f"{len(found) - len(wrong)} of {len(found)} rows as declared")
    if args.write:
        write_section(args.write, found)
    return {"rows": found, "passed": bool(found) and not wrong, **machine.description()}


class Matrix:
    """Rows below one folder; `outcome` may be called from several threads."""

    def __init__(self, folder, address, limit, cache_root=None):
        from minigpt4.quickstart.prepare import prepare

        self.folder, self.address, self.limit = folder, address, limit
        self.cache_root = prepare(cache_root).parent
        self._lock, self._finished = threading.Lock(), None

    def finished(self):
        """Return the output folder of a run that ended well, with a checkpoint within its epoch; made once."""
        with self._lock:
            if not self._finished:
                row = Row("", "finished run", lost={}, settings={"run.save_every_iters": 2})
                place = self._place(row)
                if wrong := self._judged(row, place, *self._run(row, place))["wrong"]:
                    raise RuntimeError(f"the run that others go on from: {wrong}; see {place.folder}")
                self._finished = place.folder / "out"
        return self._finished

    def outcome(self, row):
        """Return {"group", "name", "exit", "message", "lost", "seconds", "wrong": what differs from the row}."""
        place = self._place(row)
        result = self._judged(row, place, *self._run(row, place))
        print(f"{row.group}: {row.name}: {'; '.join(result['wrong']) or 'ok'} ({result['seconds']:.0f} s)", flush=True)
        return result

    def _place(self, row):
        name = re.sub(r"\W+", "_", f"{row.group}_{row.name}").strip("_")
        (self.folder / name).mkdir(parents=True)
        return Place(self.folder / name, self.address, self.finished)

    def _run(self, row, place):
        """Return (exit code or None for a run that was ended by us, seconds)."""
        if row.ranks == 1:
            command = [sys.executable, row.program]
        else:
            command = torchrun(*row.launcher, row.program, ranks=row.ranks)
        command += ["--cfg-path", self._configuration(row, place)]
        if row.unprivileged and os.geteuid() == 0:
            command = [*UNPRIVILEGED, *command]
        begin = time.perf_counter()
        process = start(command, place.folder / "said.txt")
        if row.act:
            threading.Thread(target=row.act, args=(process, place), daemon=True).start()
        try:
            code = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            kill_all(process)
            code = None
        return code, time.perf_counter() - begin

    def _configuration(self, row, place):
        """Return the path of a YAML file: that of the stage, tiny, and what the row changes."""
        from omegaconf import OmegaConf

        cfg = OmegaConf.load(ROOT / CONFIGS[f"stage{row.stage}"])
        fixed = {"run.output_dir": str(place.folder / "out"), "env.cache_root": str(self.cache_root)}
        if row.stage == 1:
            del cfg.datasets.cc_sbu
        else:
            fixed["model.ckpt"] = ""
        made = row.make(place)
        for key, value in {**SETTINGS, **fixed, **made, **row.settings}.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        OmegaConf.save(cfg, place.folder / "config.yaml")
        return place.folder / "config.yaml"

    def _judged(self, row, place, code, seconds):
        text = (place.folder / "said.txt").read_text(errors="replace")
        logs = text + "".join(path.read_text() for path in place.folder.glob("out/*/log.txt"))
        line = re.search(rf"^.*?(?:{row.says})", text, flags=re.M)
        lost = counted(text)
        wrong = {
            f"not ended after {self.limit} s": code is None,
            f"exit code {code}, not {row.code}": code not in (None, row.code),
            f"does not say '{row.says}'": line is None,
            f"lost {lost}, not {row.lost}": row.lost is not None and lost != row.lost,
            "more than one problem": row.code == 2 and "1 problem in the configuration" not in text,
            "a bare traceback": "Traceback (most" in re.sub(LAUNCHERS_TRACEBACK, "", text),
            f"says '{row.never}'": bool(re.search(row.never, logs)),
            "ran or wrote what it was given": any(self.folder.rglob("executed")) or any(self.folder.rglob("escaped*")),
        }
        wrong |= {f"does not say '{also}'": not re.search(also, text) for also in row.also}
        return {
            "group": row.group,
            "name": row.name,
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


def counted(text):
    """Return {reason: samples} of the table at the end of a run, None if there is none."""
    tables = re.findall(r"^\w+: \d+ of \d+ samples skipped(?: \((.*)\))?$", text, flags=re.M)
    if not tables:
        return None
    return {reason: int(number) for table in tables for number, reason in re.findall(r"(\d+) (\w+)", table)}


def write_section(path, found):
    """Replace what stands between the two marks of a document by the table."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path}: has no {BEGIN} .. {END}")
    path.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")


def table(found):
    """Return the rows as Markdown, one table a group."""
    parts = []
    for group, rows in groupby(found, key=lambda each: each["group"]):
        lines = [f"**{group}**", "", "| what | the run | message | samples lost | s |", "|---|---|---|---|---|"]
        for row in rows:
            did = "goes on to its end" if row["exit"] == 0 else f"ends, exit code {row['exit']}"
            lost = "–" if row["lost"] is None else ", ".join(f"{n} {why}" for why, n in row["lost"].items()) or "none"
            message = row["message"].replace("|", "\\|").replace("`", "'")
            lines.append(f"| {row['name']} | {did} | `{message}` | {lost} | {row['seconds']:.0f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
