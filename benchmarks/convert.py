"""Memory and speed of converting a caption list: ours beside json.load and csv, the 2023 way, each in its own process.

The list is generated: objects with a URL and a caption of about 12 words, some not ASCII, some quoted. No speed is
printed unless both ways write the same bytes.
"""

import csv
import filecmp
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import machine

HELP = "convert a caption list to TSV: peak memory and records a second, beside json.load and csv"
RECORDS, QUICK = 2_000_000, 100_000
WORDS = ("a", "photo", "of", "two", "dogs", "on", "the", "old", "bridge", "at", "night", "in", "café", "桥", "and")
LIMIT_MB = 150  # peak resident memory of the whole process
KINDS = ("json.load + csv", "ours")


def add_arguments(parser):
    parser.add_argument("--records", type=int, default=RECORDS, help="length of the list (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} records, for a test")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, alternating (default: %(default)s)")


def run(args):
    """Run both ways alternately, print the table, return the figures."""
    if platform.system() != "Linux":
        sys.exit("python -m benchmarks convert: peak memory is read from /proc; run it on Linux")
    number = QUICK if args.quick else args.records
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "list.json"
        write_list(source, number)
        size_mb = source.stat().st_size / 1e6
        targets = {kind: source.with_suffix(f".{place}.tsv") for place, kind in enumerate(KINDS)}
        rounds = {kind: [] for kind in KINDS}
        for turn in range(args.rounds):
            for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
                rounds[kind].append(_in_own_process(kind, source, targets[kind]))
        if not filecmp.cmp(*targets.values(), shallow=False):
            sys.exit("python -m benchmarks convert: the two ways write different bytes; no speed is shown")
    for results in rounds.values():
        for result in results:
            result["records_per_s"] = number / result["seconds"]
    figures = {
        kind: {key: median(one[key] for one in results) for key in results[0]} for kind, results in rounds.items()
    }
    passed = max(one["peak_mb"] for one in rounds["ours"]) < LIMIT_MB
    _print_table(number, size_mb, args.rounds, rounds, passed)
    return {"records": number, "rounds": rounds, "median": figures, "passed": passed, **machine.description("ijson")}


def write_list(path, number):
    """Write a JSON array of `number` captions with URLs to `path`, in constant memory."""
    with open(path, "w", encoding="utf-8") as file:
        for index in range(number):
            caption = " ".join(WORDS[(index * 7 + step * 5) % len(WORDS)] for step in range(12))
            caption = f'the "{index}" {caption}' if index % 10 == 0 else caption
            record = {
                "caption": caption,
                "url": f"https://images.example/{index % 997}/{index:09}.jpg?width=640&crop=1",
            }
            file.write(("," if index else "[") + json.dumps(record))
        file.write("]")


def convert_2023(source, target):
    """The 2023 way: the whole list in memory, one csv row an object."""
    with open(source, encoding="utf-8") as file:
        records = json.load(file)
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(records[0].keys())
        writer.writerows(record.values() for record in records)


def _in_own_process(kind, source, target):
    command = [sys.executable, "-m", "benchmarks.convert", kind, str(source), str(target)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _measure(kind, source, target):
    """Print seconds, the imports left out, and the peak of resident memory (MB) of the whole process."""
    convert = convert_2023
    if kind == "ours":
        from minigpt4.datasets.convert import convert
    start = time.perf_counter()
    convert(source, target)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))


def peak_mb():
    """Return the largest resident memory, in MB, that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def _print_table(number, size_mb, count, rounds, passed):
    print(f"{number:,} records, {size_mb:.0f} MB of JSON; median of {count} [min .. max]; equal bytes: yes")
    print(f"{'':<18}{'peak MB':>30}{'records/s':>36}")
    for kind, results in rounds.items():
        cells = []
        for key in ("peak_mb", "records_per_s"):
            values = sorted(result[key] for result in results)
            cells.append(f"{median(values):,.0f} [{values[0]:,.0f} .. {values[-1]:,.0f}]")
        print(f"{kind:<18}{cells[0]:>30}{cells[1]:>36}")
    print(f"ours below {LIMIT_MB} MB: {'PASS' if passed else 'FAIL'}")


if __name__ == "__main__":
    _measure(*sys.argv[1:])
