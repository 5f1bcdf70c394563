"""One pass over a dataset as training reads it: what is found in it, and the lines that say so."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4.common.config import Config
from minigpt4.datasets.download_stats import describe, read_download_stats

# one in so many cards is kept for texts that are cut, where the first samples have none
SHARE_CUT = 4


@dataclass
class Scan:
    """What was found in one dataset; `lengths` counts texts by their tokens, `shown` are samples for the sheet."""

    dataset: Any
    missing: list = field(default_factory=list)  # shards
    is_whole: bool = False
    error: str = ""  # why the pass over the data ended early
    seconds: float = 0.0  # spent in reading, decoding, augmenting
    lengths: Counter = field(default_factory=Counter)
    num_cut: int = 0
    shown: list = field(default_factory=list)

    def percentile(self, percent: float) -> int:
        """Return the least length that `percent` % of the texts do not exceed."""
        rest = self.lengths.total() * percent / 100
        for length in sorted(self.lengths):
            rest -= self.lengths[length]
            if rest <= 0:
                return length
        raise ValueError("no text was scanned")


def scan(dataset: Any, preview: Any, seed: int, limit: int | None, num_shown: int) -> Scan:
    """Return the Scan of the first `limit` samples (None: all) that training reads from a dataset."""
    from minigpt4.datasets.datasets.base_dataset import Place
    from minigpt4.datasets.datasets.shard_list import missing_shards
    from minigpt4.datasets.datasets.skips import DataError

    dataset.bind(Place(seed), max_bad_fraction=1.0)  # it is looked at, however bad it is
    found = Scan(dataset, missing_shards(getattr(dataset, "shards", ())))
    if missing := set(found.missing):
        dataset.shards = [shard for shard in dataset.shards if shard not in missing]
    # what a sample costs and holds; the first ones are shown, and some of those that are cut
    samples, cut = dataset.one_pass(), []
    num_cut_shown = -(-num_shown // SHARE_CUT)
    title = f"scanning {dataset.name}"
    with tqdm(total=limit, desc=title, unit=" samples", disable=None) as progress:
        while limit is None or dataset.skips.report()["seen"] < limit:
            start = time.perf_counter()
            try:
                sample = next(samples, None)
            except DataError as error:
                found.error = str(error)
                break
            found.seconds += time.perf_counter() - start
            if sample is None:
                found.is_whole = True
                break
            ((length, num_cut),) = preview.lengths([sample])
            found.lengths[length] += 1
            found.num_cut += num_cut > 0
            if len(found.shown) < num_shown:
                found.shown.append((sample, num_cut))
            elif num_cut and len(cut) < num_cut_shown:
                cut.append((sample, num_cut))
            progress.update(dataset.skips.report()["seen"] - progress.n)
    if not found.lengths:
        found.error = found.error or str(dataset.skips.nothing_usable())
    # texts that are cut take the place of the last ones that are not, until enough are shown
    whole = [index for index, (_, num_cut) in enumerate(found.shown) if not num_cut]
    num_needed = max(0, num_cut_shown - (len(found.shown) - len(whole)))
    for index, item in zip(reversed(whole), cut[:num_needed], strict=False):
        found.shown[index] = item
    return found


def table(found: Scan, cfg: Config) -> list[str]:
    """Return the lines that say what was found in one dataset."""
    dataset, rows = found.dataset, []
    if hasattr(dataset, "shards"):
        rows += _shard_rows(found)
    # What was read of the dataset, and what of it cannot be used, by reason.
    counts = dataset.skips.report()
    seen, held_out = counts.pop("seen"), counts.pop("held_out", 0)
    first = f"the first {seen:,} samples in training's order (--scan all for the rest)"
    rows.append(("scanned", f"all {seen:,} samples" if found.is_whole else first))
    bad = sum(counts.values())
    rows.append(("usable", f"{seen - bad:,}{_share(seen - bad, seen)}"))
    for reason, number in counts.items():
        rows.append(("skipped", f"{number:,} {reason}{_share(number, seen)}"))
    if held_out:
        rows.append(("held out", f"{held_out:,} for the validation split (val_fraction)"))
    if bad > cfg.run_cfg.max_bad_fraction * seen:
        limit = f"run.max_bad_fraction={cfg.run_cfg.max_bad_fraction:g}"
        judged = "judged from a worker's thousandth sample on"
        rows.append(("", f"too many: training stops above {limit}, {judged}"))
    if found.error:
        rows.append(("stopped", found.error))
    # How long the texts are against max_txt_len: what is cut off is not learnt.
    if total := found.lengths.total():
        shares = {"5%": 5, "median": 50, "95%": 95}
        lengths = [f"{name} {found.percentile(percent)}" for name, percent in shares.items()]
        lengths.append(f"longest {max(found.lengths)}")
        rows.append(("text", f"tokens, end symbol included: {', '.join(lengths)}"))
        cut = f"{found.num_cut:,} of {total:,} texts{_share(found.num_cut, total)}"
        rows.append(("cut", f"{cut} are longer than model.max_txt_len={cfg.model_cfg.max_txt_len}"))
        rows.append(("speed", f"{total / found.seconds:,.0f} img/s in one process"))
    return [dataset.name, *(f"  {name:<10}{text}" for name, text in rows)]


def _share(number: int, total: int) -> str:
    return f" ({number / total:.1%})" if total else ""


def _shard_rows(found: Scan) -> list[tuple[str, str]]:
    """Return the rows about tars, and about the downloads whose statistics lie beside them."""
    from minigpt4.datasets.datasets.shard_list import is_address

    shards = [*found.dataset.shards, *found.missing]
    first = f" (first: {found.missing[0]})" if found.missing else ""
    counted = f"{len(found.dataset.shards):,} found, {len(found.missing):,} missing{first}"
    rows = [("shards", counted)]
    for folder in sorted({Path(shard).parent for shard in shards if not is_address(shard)}):
        try:
            stats = read_download_stats(folder)
        except ValueError as error:
            rows.append(("download", str(error)))
            continue
        lines = describe(stats) if stats.shards else [f"no statistics of img2dataset in {folder}"]
        rows += [("download" if not number else "", line) for number, line in enumerate(lines)]
    return rows
