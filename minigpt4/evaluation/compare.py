"""Compare two results of one benchmark: which differences are significant, and which items changed."""

from __future__ import annotations

import dataclasses
import importlib
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from minigpt4.evaluation.metrics.intervals import Difference
from minigpt4.evaluation.page import STYLE, document, reference_text
from minigpt4.evaluation.results import number, read_results


class Comparison(NamedTuple):
    """B against A over their common items."""

    names: tuple[str, str]  # the paths of A and B
    values: dict[str, tuple[float, float]]  # by metric, of A and of B
    differences: dict[str, Difference]  # by metric, B - A
    changed: list[tuple[dict, dict]]  # records of A and B whose scores differ, greatest loss first
    num_common: int
    notes: list[str]  # settings that differ too


def compare(path_a: str | Path, path_b: str | Path) -> Comparison:
    """Return what changed from one results.json to another.

    Both are scored again, over the items that both have answered, by the installed code with B's settings.
    Raises ValueError for results of different benchmarks, or without common items, and OSError.
    """
    a, b = read_results(path_a), read_results(path_b)
    if a["benchmark"] != b["benchmark"]:
        found = f"'{path_a}' is of {a['benchmark']}, '{path_b}' of {b['benchmark']}"
        raise ValueError(f"{found}; expected the same benchmark")
    # Only the same items with the same references can be compared.
    records_a, records_b = _answered(a), _answered(b)
    common = [item_id for item_id in records_a if item_id in records_b]
    if not common:
        raise ValueError(f"'{path_a}' and '{path_b}' have no answered item in common")
    for item_id in common:
        if records_a[item_id]["reference"] != records_b[item_id]["reference"]:
            raise ValueError(
                f"item '{item_id}' has different references in '{path_a}' and '{path_b}': the data differ"
            )

    # One rule scores both. The bootstrap draws the same items for both, which makes the intervals narrower.
    benchmark = _benchmark_of(b)
    items = [_item(records_b[item_id]) for item_id in common]
    scores_a = benchmark.score(items, {item_id: records_a[item_id]["answer"] for item_id in common})
    scores_b = benchmark.score(items, {item_id: records_b[item_id]["answer"] for item_id in common})
    values, differences = {}, {}
    for name, metric_b in scores_b.metrics.items():
        metric_a = scores_a.metrics[name]
        values[name] = (metric_a.value(), metric_b.value())
        differences[name] = metrics.paired_bootstrap(
            metric_b.rows, metric_a.rows, metric_b.of, stratum=metric_b.stratum
        )

    gains = {item_id: scores_b.per_item[item_id] - scores_a.per_item[item_id] for item_id in common}
    changed = []
    for item_id in sorted(gains, key=gains.get):
        if abs(gains[item_id]) > 1e-9:
            record_a = records_a[item_id] | {"score": scores_a.per_item[item_id]}
            record_b = records_b[item_id] | {"score": scores_b.per_item[item_id]}
            changed.append((record_a, record_b))
    notes = _notes(a, b, len(common), max(len(records_a), len(records_b)))
    return Comparison((str(path_a), str(path_b)), values, differences, changed, len(common), notes)


def _item(record: Mapping[str, Any]) -> BenchmarkItem:
    """Return the item of a record; an earlier version did not keep the options."""
    return BenchmarkItem(**{key: record[key] for key in BenchmarkItem._fields if key in record})


def _answered(result: Mapping[str, Any]) -> dict[str, dict]:
    return {record["id"]: record for record in result["items"] if "answer" in record}


def _benchmark_of(result: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a result, to score answers again; its files are not needed."""
    # A benchmark of a user's own registers itself when its module is imported.
    with suppress(ImportError):
        importlib.import_module(result["module"])
    cls = registry.get_benchmark_class(result["benchmark"])
    known = [field.name for field in dataclasses.fields(cls.Config)]
    # Settings that only another version had are dropped.
    settings = {key: value for key, value in result["settings"].items() if key in known}
    return cls(cls.Config(**settings), result["benchmark"])


def _notes(a: Mapping[str, Any], b: Mapping[str, Any], num_common: int, most: int) -> list[str]:
    """Return what else differs and may explain a difference; `most`: items answered in the larger result."""
    notes = [f"only {num_common} items are in both, of {most}"] if num_common < most else []
    pairs = {}
    for key in ("control", "prompt", "data", "weights", "rules", "versions"):
        pairs[key] = (a.get(key), b.get(key))
    for key, value in b["settings"].items():
        if key not in (
            "prompt",
            "questions",
            "img_path",
        ):  # the latter two change with the folder alone
            pairs[key] = (a["settings"].get(key), value)
    for key, (old, new) in pairs.items():
        if old != new:
            old, new = ("none" if value in (None, "", {}) else value for value in (old, new))
            notes.append(f"{key}: {old} -> {new}")
    return notes


def compare_results(path_a: str | Path, path_b: str | Path, page: Path) -> None:
    """Print what changed from one results.json to another, and write it as a page. Raises as `compare`."""
    comparison = compare(path_a, path_b)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(comparison_page(comparison), encoding="utf-8", errors="backslashreplace")
    print(comparison_text(comparison), f"\n{page}")


def comparison_text(comparison: Comparison, num_items: int = 20) -> str:
    """Return the comparison as lines of text, with the items that lost and gained most."""
    a, b = comparison.names
    lines = [f"A: {a}", f"B: {b}", f"{comparison.num_common} common items", *comparison.notes, ""]
    lines.append(f"{'metric':24} {'A':>9} {'B':>9} {'B - A':>9}   95 % interval         p")
    for name, difference in comparison.differences.items():
        value_a, value_b = map(number, comparison.values[name])
        low, high = number(difference.low), number(difference.high)
        change = number(difference.value)
        lines.append(
            f"{name:24} {value_a:>9} {value_b:>9} {change:>9}   {low:>8} to {high:>8}  {difference.p_value:.3f}"
        )
    lines += ["", f"{len(comparison.changed)} items changed; lost most first"]
    for old, new in shown(comparison.changed, num_items):
        answer_a, answer_b = (
            textwrap.shorten(repr(record["answer"]), 80, placeholder=" ..") for record in (old, new)
        )
        lines.append(
            f"  {old['id']}  {old['score']:.3f} -> {new['score']:.3f}  {answer_a} -> {answer_b}"
        )
    return "\n".join(lines)


def shown(changed: list, count: int) -> list:
    """Return at most `count` of the changed items: those that lost most and those that gained most."""
    half = count // 2
    return changed if len(changed) <= count else [*changed[:half], *changed[-half:]]


def comparison_page(comparison: Comparison, num_items: int = 1000) -> str:
    """Return the comparison as an HTML page with a table of the items that changed."""
    from minigpt4.datasets.sheet import visible

    a, b = map(visible, comparison.names)
    body = [
        "<h1>Two results compared</h1>",
        f"<p>A: {a}</p><p>B: {b}</p><p>{comparison.num_common} common items</p>",
    ]
    body += [f"<p>{visible(note)}</p>" for note in comparison.notes]
    body.append(f'<div class="scroll"><table>{_metric_rows(comparison)}</table></div>')
    body.append(f"<h2>{len(comparison.changed)} items changed, lost most first</h2>")
    items = _item_rows(shown(comparison.changed, num_items))
    body.append(f'<div class="scroll"><table>{items}</table></div>')
    return document("Two results compared", STYLE, body)


def _metric_rows(comparison: Comparison) -> str:
    """Return the rows of the table of metrics as HTML."""
    from minigpt4.datasets.sheet import visible

    columns = ("A", "B", "B - A", "95 % from", "to", "p")
    head = "".join(f'<th class="n">{column}</th>' for column in columns)
    rows = [f"<tr><th>metric</th>{head}</tr>"]
    for name, change in comparison.differences.items():
        values = (*comparison.values[name], change.value, change.low, change.high)
        texts = [*map(number, values), f"{change.p_value:.3f}"]
        cells = "".join(f"<td class=n>{text}</td>" for text in texts)
        rows.append(f"<tr><td>{visible(name)}</td>{cells}</tr>")
    return "".join(rows)


def _item_rows(changed: list[tuple[dict, dict]]) -> str:
    """Return the rows of the table of changed items as HTML."""
    from minigpt4.datasets.sheet import visible

    columns = ("item", "question", "right", "A says", "B says", "A", "B")
    rows = [f"<tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr>"]
    for old, new in changed:
        reference = reference_text(old["reference"])
        texts = [old["id"], old["question"], reference, old["answer"], new["answer"]]
        cells = [f"<td>{visible(text)}</td>" for text in texts]
        cells += [f"<td class=n>{record['score']:.3f}</td>" for record in (old, new)]
        kind = "lost" if new["score"] < old["score"] else "won"
        rows.append(f"<tr class={kind}>{''.join(cells)}</tr>")
    return "".join(rows)
