"""What img2dataset got and what it lost, from the `NNNNN_stats.json` beside its shards.

    python -m minigpt4.datasets.download_stats laion_dataset

This file needs nothing but Python, so that the environment of img2dataset can run it too.
"""

from __future__ import annotations  # for an old Python of that environment

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

    shards: int  # shards with a stats file, that is: finished
    # names of the others, as far as a tar or a gap shows them: to be downloaded again
    unfinished: list[str]
    count: int  # URLs tried
    successes: int  # samples in the finished tars
    failed_to_download: int
    failed_to_resize: int  # came, but are no image that can be decoded
    status: Counter  # "success" or img2dataset's error message -> samples, as far as the files say


def read_download_stats(folder: str | Path) -> DownloadStats:
    """Return the DownloadStats of all `*_stats.json` in a folder; without any, every number is 0.

    Raises ValueError naming the file if one is not what img2dataset writes.
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
    return DownloadStats(
        shards, unfinished_shards(folder), *map(totals.__getitem__, COUNTS), status
    )


def finished_shards(folder: str | Path) -> list[str]:
    """Return the sorted names, like "00000", of the shards that have a stats file."""
    return sorted(
        path.name.removesuffix("_stats.json") for path in Path(folder).glob("*_stats.json")
    )


def unfinished_shards(folder: str | Path) -> list[str]:
    """Return the sorted names of shards with a tar but no stats file, and of gaps in the numbers of finished ones."""
    finished = finished_shards(folder)
    begun = {path.stem for path in Path(folder).glob("*.tar")}
    if finished and finished[-1].isdigit():
        begun |= {f"{number:0{len(finished[-1])}}" for number in range(int(finished[-1]))}
    return sorted(begun - set(finished))


def describe(stats: DownloadStats, most_common: int = 10) -> list[str]:
    """Return the lines of a report: how many images came, what was lost and why."""
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
    if len(reasons) > most_common:
        lines.append(
            f"  {sum(number for _, number in reasons[most_common:]):>12,}  {len(reasons) - most_common} others"
        )
    if stats.unfinished:
        lines.append(
            f"{len(stats.unfinished):,} unfinished, start again to resume: {', '.join(stats.unfinished[:5])}"
        )
    return lines


def storage_of(folder: str | Path) -> str | None:
    """Return the `storage` value (of a dataset's YAML) that names the shards of a folder, or None without shards."""
    names, path = finished_shards(folder), Path(folder).resolve()
    if unfinished_shards(folder):
        return f"{path}/*.tar"
    if len(names) > 1:
        return f"{path}/{{{names[0]}..{names[-1]}}}.tar"
    return f"{path}/{names[0]}.tar" if names else None


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 where nothing came."""
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
