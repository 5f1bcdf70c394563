"""Converts BLIP's caption lists to the TSV that img2dataset reads, in constant memory.

Input: a JSON array of flat objects with at least `url` and `caption`. Output: a header line with the keys
of the first object, then one line per object with its values in the order of the header; UTF-8, separated by
tabs, quoted only where needed, lines end with CRLF. If all objects have the same keys in the same order, the
output is byte-identical to that of 2023. Source: MiniGPT-4 2023, Python's csv.
"""

import argparse
import csv
import os
import random
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import ijson
from tqdm import tqdm

from minigpt4.common.cli import run_program
from minigpt4.common.lock import locked

REQUIRED = ("url", "caption")
MAX_BAD_FRACTION = 0.05
LINE_BREAK = "line break in a value"


@dataclass
class Report:
    """Statistics of one conversion.

    `left_out` and `remarks` (of records that are written nonetheless) count reasons; `first` maps a reason to the number
    of its first record.
    """

    read: int = 0
    written: int = 0
    columns: list[str] | None = None
    left_out: Counter = field(default_factory=Counter)
    remarks: Counter = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def count(self, counter: Counter, reason: str) -> None:
        """Add the record that was read last to a reason of `counter`: `left_out` or `remarks`."""
        counter[reason] += 1
        self.first.setdefault(reason, self.read)

    def lines(self, counter: Counter) -> list[str]:
        """Return one line per reason, the most frequent first."""
        line = "{:>12,}  {} (first: record {:,})".format
        return [line(number, text, self.first[text]) for text, number in counter.most_common()]


def convert(
    source: str | Path,
    target: str | Path,
    limit: int | None = None,
    sample_seed: int | None = None,
    one_line: bool = False,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Report:
    """Write `target` from `source` and return the Report.

    `limit` keeps that many records: the first ones, or, with `sample_seed`, a uniform sample in the order of
    the list, which is then read twice. `one_line` replaces line breaks inside values by spaces. `target` is
    written completely or not at all. Raises ValueError if the list is not a JSON array, has no usable record,
    or if more than `max_bad_fraction` of its records cannot be used; InUseError if another process writes
    `target`.
    """
    source, target = Path(source), Path(target)
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output '{target}' is the input itself; give another name")
    report = Report()
    rows = islice(usable_rows(source, report, "converting", one_line), limit)
    with written_whole(target) as file:
        if sample_seed is not None:
            # the first pass fills the report; the second one has to repeat the same rows, but counts nothing
            total = sum(1 for _ in usable_rows(source, report, "counting", one_line))
            second_pass = usable_rows(source, Report(), "converting", one_line)
            rows = sample(second_pass, total, limit, sample_seed)
        writer = csv.writer(file, delimiter="\t")
        for row in rows:
            if not report.written:
                writer.writerow(report.columns)
            writer.writerow(row)
            report.written += 1
        _check(report, source, max_bad_fraction)
    return report


def _check(report: Report, source: Path, max_bad_fraction: float) -> None:
    """Raise ValueError if nothing was written, or if too many records cannot be used."""
    bad_fraction = report.left_out.total() / max(report.read, 1)
    if report.written and bad_fraction <= max_bad_fraction:
        return
    problem = f"none of {report.read:,} records can be used"
    if report.written:
        share = f"{bad_fraction:.1%} of {report.read:,} records"
        problem = f"{share} cannot be used (limit {max_bad_fraction:.1%}, --max-bad-fraction)"
    raise ValueError(
        "\n".join([f"'{source}': {problem}; nothing was written", *report.lines(report.left_out)])
    )


def usable_rows(source: Path, report: Report, title: str, one_line: bool = False) -> Iterator[list]:
    """Yield the values of each usable record in the order of `report.columns`, the keys of the first one."""
    for record in json_array(source, title):
        report.read += 1
        if problem := problem_of(record):
            report.count(report.left_out, problem)
            continue
        if report.columns is None:
            report.columns = list(record)
        values = _aligned(record, report)
        if not record["caption"]:
            report.count(report.remarks, "empty caption")
        for column, value in enumerate(values):
            if type(value) is Decimal:
                values[column] = float(value)  # as json.load reads it
            elif type(value) is str and ("\n" in value or "\r" in value):
                report.count(report.remarks, LINE_BREAK)
                values[column] = " ".join(value.splitlines()) if one_line else value
        yield values


def problem_of(record: Any) -> str | None:
    """Return why a record cannot become a row, or None if it can."""
    if type(record) is not dict:
        return f"not an object but {type(record).__name__}"
    if missing := [name for name in REQUIRED if name not in record]:
        return f"no '{missing[0]}'"
    if type(record["url"]) is not str or not record["url"].strip():
        return "'url' is empty or no text"
    if type(record["caption"]) is not str and record["caption"] is not None:
        return "'caption' is no text"
    for name, value in record.items():
        if type(value) is dict or type(value) is list:
            return f"'{name}' is a list or an object"
    return None


def _aligned(record: dict, report: Report) -> list:
    """Return a record's values in the order of `report.columns`; keys that differ from these become remarks."""
    if list(record) == report.columns:
        return list(record.values())
    for name in record.keys() - set(report.columns):
        report.count(report.remarks, f"'{name}' is no column of the first record: left out")
    for name in set(report.columns) - record.keys():
        report.count(report.remarks, f"no '{name}': an empty field")
    return [record.get(name) for name in report.columns]


def json_array(path: Path, title: str) -> Iterator[Any]:
    """Yield the elements of the JSON array in a file one at a time; on a terminal, with a progress bar in bytes."""
    with open(path, "rb") as file:
        start = len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0
        file.seek(start)
        head = file.read(64).lstrip()[:1]
        if head != b"[":
            raise ValueError(
                f"'{path}' begins with {head!r}; expected '[', the start of a JSON array of objects"
            )
        file.seek(start)
        size, number = path.stat().st_size, 0
        options = {"total": size, "desc": title, "unit": "B", "unit_scale": True, "disable": None}
        with tqdm.wrapattr(file, "read", **options) as counted:
            try:
                for element in ijson.items(counted, "item"):
                    number += 1
                    yield element
            except ijson.JSONError as error:
                reason = error.args[0]
                if isinstance(reason, bytes):
                    reason = reason.decode(errors="replace")
                raise ValueError(
                    f"'{path}' is no valid JSON behind record {number:,} (before byte {file.tell():,} of {size:,}): "
                    f"{str(reason).splitlines()[0]}. Is it whole? Fetch it again; nothing was written"
                ) from error


def sample(rows: Iterable[list], total: int, wanted: int, seed: int) -> Iterator[list]:
    """Yield `wanted` of `total` rows in order; each subset is equally likely (selection sampling)."""
    rng = random.Random(seed)
    for num_left, row in zip(range(total, 0, -1), rows, strict=False):
        if rng.random() * num_left < wanted:
            yield row
            wanted -= 1
        if not wanted:
            return


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """Open a temporary text file that is renamed to `path` at the end of the block, and removed if it raises.

    Raises InUseError if another process writes `path`.
    """
    partial = path.with_name(path.name + ".partial")
    with locked(path):
        try:
            with open(partial, "w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def main(stem: str, argv: Sequence[str] | None = None) -> int:
    """Run the command line, whose default files are `stem`.json and `stem`.tsv; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Convert a JSON list of captions and URLs to the TSV of img2dataset."
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        default=Path(f"{stem}.json"),
        help="JSON array of objects (default: %(default)s)",
    )
    add("--output", type=Path, help="TSV (default: name of the input with .tsv)")
    add(
        "--limit",
        type=_positive,
        metavar="N",
        help="only N records: the first, or with --sample-seed any",
    )
    add(
        "--sample-seed",
        type=int,
        metavar="SEED",
        help="draw the N records at random; equal seeds, equal records",
    )
    add(
        "--one-line",
        action="store_true",
        help="line breaks inside captions become spaces (2023 kept them)",
    )
    limit_help = (
        "if more records than this cannot be used, write nothing and fail (default: %(default)s)"
    )
    add("--max-bad-fraction", type=float, default=MAX_BAD_FRACTION, metavar="F", help=limit_help)
    args = parser.parse_args(argv)
    if args.sample_seed is not None and args.limit is None:
        parser.error("--sample-seed draws from the list; say how many by --limit N")
    return run_program(_convert_and_report, args)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}'; expected a whole number above 0")
    return int(text)


def _convert_and_report(args: argparse.Namespace) -> None:
    if not args.input.is_file():
        raise FileNotFoundError(
            f"--input: no file at '{args.input}'; dataset/README_1_STAGE.md says where it is from"
        )
    output = args.output or args.input.with_suffix(".tsv")
    report = convert(
        args.input, output, args.limit, args.sample_seed, args.one_line, args.max_bad_fraction
    )
    print(
        f"{output}: {report.written:,} rows of {', '.join(report.columns)}; {report.read:,} records read"
    )
    if report.left_out:
        print(
            "\n".join(
                [f"left out: {report.left_out.total():,} records", *report.lines(report.left_out)]
            )
        )
    if report.remarks:
        print("\n".join(["not left out, but worth a look:", *report.lines(report.remarks)]))
    if report.remarks[LINE_BREAK] and not args.one_line:
        print(
            "img2dataset fails on a long list with line breaks inside values: --one-line turns them into spaces"
        )


if __name__ == "__main__":
    sys.exit("run dataset/convert_laion.py or dataset/convert_cc_sbu.py")
