"""One pass over a dataset in training's order: statistics of its samples, and the table that shows them."""

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4.common.config import Config
from minigpt4.common.utils import printable
from minigpt4.datasets.download_stats import describe, read_download_stats

# one card in so many is reserved for texts that are cut, if the first samples have fewer of them
SHARE_CUT = 4


@dataclass
class Scan:
    """Statistics of one dataset."""

    dataset: Any
    missing: list = field(default_factory=list)  # shards
    is_whole: bool = False  # the pass reached the end of the data
    error: str = ""  # why the pass ended early
    seconds: float = 0.0  # spent in reading, decoding, augmenting
    lengths: Counter = field(default_factory=Counter)  # tokens of a text -> number of such texts
    num_cut: int = 0  # texts that max_txt_len cuts
    shown: list = field(default_factory=list)  # (sample, tokens cut off) for the sheet

    def percentile(self, percent: float) -> int:
        """Return the least length that `percent` % of the texts do not exceed."""
        rest = self.lengths.total() * percent / 100
        for length in sorted(self.lengths):
            rest -= self.lengths[length]
            if rest <= 0:
                return length
        raise ValueError("no text was scanned")


def scan(dataset: Any, preview: Any, seed: int, limit: int | None, num_shown: int) -> Scan:
    """Return the Scan of the first `limit` samples (None: all) in training's order; `num_shown`: samples to show."""
    from minigpt4.datasets.datasets.base_dataset import Place
    from minigpt4.datasets.datasets.shard_list import missing_shards
    from minigpt4.datasets.datasets.skips import DataError

    dataset.bind(Place(seed), max_bad_fraction=1.0)  # bad samples are to be counted, however many
    found = Scan(dataset, missing_shards(getattr(dataset, "shards", ())))
    if missing := set(found.missing):
        dataset.shards = [shard for shard in dataset.shards if shard not in missing]
    # the first samples are shown; of the later ones, some whose texts are cut are kept to replace them
    samples, later_cut = dataset.one_pass(), []
    num_cut_shown = math.ceil(num_shown / SHARE_CUT)
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
            try:
                ((length, num_cut),) = preview.lengths([sample])
            except ValueError as error:  # the model would refuse it, and training end
                found.error = f"sample {printable(sample['sample_id'])}: {error}"
                break
            found.lengths[length] += 1
            found.num_cut += num_cut > 0
            if len(found.shown) < num_shown:
                found.shown.append((sample, num_cut))
            elif num_cut and len(later_cut) < num_cut_shown:
                later_cut.append((sample, num_cut))
            progress.update(dataset.skips.report()["seen"] - progress.n)
    if not found.lengths:
        found.error = found.error or str(dataset.skips.nothing_usable())
    # samples with cut texts replace the last ones with uncut texts, until enough are shown
    uncut = [index for index, (_, num_cut) in enumerate(found.shown) if not num_cut]
    num_needed = max(0, num_cut_shown - (len(found.shown) - len(uncut)))
    for index, item in zip(reversed(uncut), later_cut[:num_needed], strict=False):
        found.shown[index] = item
    return found


def table(found: Scan, cfg: Config) -> list[str]:
    """Return the lines of the table of one dataset."""
    dataset, rows = found.dataset, []
    if hasattr(dataset, "shards"):
        rows += _shard_rows(found)
    # samples read, and those that cannot be used, by reason
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
    # lengths of the texts, compared to max_txt_len: text that is cut off is not learnt
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
    """Return the rows about the tars, and about img2dataset's download if its statistics are beside them."""
    from minigpt4.datasets.datasets.shard_list import is_address

    shards = [*found.dataset.shards, *found.missing]
    first = f" (first: {found.missing[0]})" if found.missing else ""
    counts = f"{len(found.dataset.shards):,} found, {len(found.missing):,} missing{first}"
    rows = [("shards", counts)]
    for folder in sorted({Path(shard).parent for shard in shards if not is_address(shard)}):
        try:
            stats = read_download_stats(folder)
        except ValueError as error:
            rows.append(("download", str(error)))
            continue
        lines = describe(stats) if stats.shards else [f"no statistics of img2dataset in {folder}"]
        rows += [("download" if not number else "", line) for number, line in enumerate(lines)]
    return rows
