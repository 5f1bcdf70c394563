"""Statistics of an img2dataset download: what was downloaded and what failed, from `NNNNN_stats.json` beside its shards.

    python -m minigpt4.datasets.download_stats laion_dataset

This file needs only the standard library, so that it also runs in the environment of img2dataset.
"""

from __future__ import annotations  # that environment may have an old Python

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")


class DownloadStats(NamedTuple):
    """Sums over the shards of a folder: count = successes + failed_to_download + failed_to_resize."""

    shards: int  # number of finished shards: those with a stats file
    # names of the others, which must be downloaded again, as far as a tar or a gap in the numbers shows them
    unfinished: list[str]
    count: int  # URLs tried
    successes: int  # samples in the finished tars
    failed_to_download: int
    failed_to_resize: int  # downloaded, but not an image that can be decoded
    status: Counter  # "success" or img2dataset's error message -> number of samples, if the files contain it


def read_download_stats(folder: str | Path) -> DownloadStats:
    """Return the DownloadStats of all `*_stats.json` in a folder; if there is none, all numbers are 0.

    Raises ValueError that names the file if one is not as img2dataset writes it.
    """
    totals, status = Counter(), Counter()
    shards = 0
    for path in sorted(Path(folder).glob("*_stats.json")):
        try:
            stats = json.loads(path.read_text(encoding="utf-8"))
            totals.update({name: int(stats[name]) for name in COUNTS})
            status.update(stats.get("status_dict", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: no statistics of img2dataset ({type(error).__name__}: {error}); delete the file and start "
                "the download again: it then does this shard anew"
            ) from error
        shards += 1
    counts = [totals[name] for name in COUNTS]
    return DownloadStats(shards, unfinished_shards(folder), *counts, status)


def finished_shards(folder: str | Path) -> list[str]:
    """Return the sorted names, like "00000", of the shards that have a stats file."""
    return sorted(
        path.name.removesuffix("_stats.json") for path in Path(folder).glob("*_stats.json")
    )


def unfinished_shards(folder: str | Path) -> list[str]:
    """Return the sorted names of shards with a tar but no stats file, and of those missing between finished ones."""
    finished = finished_shards(folder)
    started = {path.stem for path in Path(folder).glob("*.tar")}
    if finished and finished[-1].isdigit():
        num_digits = len(finished[-1])
        started |= {f"{number:0{num_digits}}" for number in range(int(finished[-1]))}
    return sorted(started - set(finished))


def describe(stats: DownloadStats, most_common: int = 10) -> list[str]:
    """Return the lines of a report: how many images were downloaded, what failed and why."""
    share = f" ({stats.successes / stats.count:.1%})" if stats.count else ""
    lines = [
        f"{stats.successes:,} of {stats.count:,} images{share} in {stats.shards:,} finished shards"
    ]
    lines += [
        f"  {stats.failed_to_download:>12,}  failed to download",
        f"  {stats.failed_to_resize:>12,}  no image",
    ]
    reasons = [
        (reason, number) for reason, number in stats.status.most_common() if reason != "success"
    ]
    if reasons:
        lines.append("most frequent reasons:")
        lines += [
            f"  {number:>12,}  {' '.join(reason.split())[:100]}"
            for reason, number in reasons[:most_common]
        ]
    if others := reasons[most_common:]:
        num_samples = sum(number for _, number in others)
        lines.append(f"  {num_samples:>12,}  {len(others)} others")
    if stats.unfinished:
        lines.append(
            f"{len(stats.unfinished):,} unfinished, start again to resume: {', '.join(stats.unfinished[:5])}"
        )
    return lines


def storage_of(folder: str | Path) -> str | None:
    """Return the value of `storage` in a dataset's YAML for the shards of a folder; None if it has no shards."""
    names, path = finished_shards(folder), Path(folder).resolve()
    if unfinished_shards(folder):
        return f"{path}/*.tar"
    if len(names) > 1:
        return f"{path}/{{{names[0]}..{names[-1]}}}.tar"
    return f"{path}/{names[0]}.tar" if names else None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of a folder; return the exit code, 1 if nothing was downloaded."""
    parser = argparse.ArgumentParser(description="Print what img2dataset got and what it lost.")
    parser.add_argument("folder", type=Path, help="the output folder of img2dataset")
    folder = parser.parse_args(argv).folder
    try:
        stats = read_download_stats(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not stats.shards:
        print(
            f"error: no NNNNN_stats.json in '{folder}'; expected the output folder of img2dataset",
            file=sys.stderr,
        )
        return 1
    print("\n".join(describe(stats)))
    print(f"storage: {storage_of(folder)}")
    return 0 if stats.successes else 1


if __name__ == "__main__":
    sys.exit(main())
