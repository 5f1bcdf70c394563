"""Two results of one benchmark: which differences are more than chance, and which items have changed."""

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
    """B against A over their common items. `changed`: records of A and of B whose scores differ, most lost first."""

    names: tuple[str, str]
    values: dict[str, tuple[float, float]]  # by metric
    differences: dict[str, Difference]
    changed: list[tuple[dict, dict]]
    num_common: int
    notes: list[str]


def compare(path_a: str | Path, path_b: str | Path) -> Comparison:
    """Return what changed from one results.json to another.

    Both are scored again, over the items that both have answered, by one rule: today's, with B's settings.
    Raises ValueError for results of different benchmarks, or without common items, and OSError.
    """
    a, b = read_results(path_a), read_results(path_b)
    if a["benchmark"] != b["benchmark"]:
        found = f"'{path_a}' is of {a['benchmark']}, '{path_b}' of {b['benchmark']}"
        raise ValueError(f"{found}; expected the same benchmark")
    # Only the same items with the same references can be compared.
    first, second = _answered(a), _answered(b)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(f"'{path_a}' and '{path_b}' have no answered item in common")
    other = next(
        (name for name in common if first[name]["reference"] != second[name]["reference"]), None
    )
    if other is not None:
        raise ValueError(
            f"item '{other}' has different references in '{path_a}' and '{path_b}': the data differ"
        )

    # Both are scored by one rule; the difference is paired by item, which makes its interval narrower.
    benchmark = _benchmark_of(b)
    items = [_item(second[name]) for name in common]
    scores_a = benchmark.score(items, {name: first[name]["answer"] for name in common})
    scores_b = benchmark.score(items, {name: second[name]["answer"] for name in common})
    values, differences = {}, {}
    for name, metric in scores_b.metrics.items():
        before = scores_a.metrics[name]
        values[name] = (before.value(), metric.value())
        differences[name] = metrics.paired_bootstrap(metric.rows, before.rows, metric.of)
    # The items whose score changed, the greatest loss first.
    gain = {name: scores_b.per_item[name] - scores_a.per_item[name] for name in common}
    changed = []
    for name in sorted(gain, key=gain.get):
        if abs(gain[name]) > 1e-9:
            old, new = scores_a.per_item[name], scores_b.per_item[name]
            changed.append((first[name] | {"score": old}, second[name] | {"score": new}))
    notes = _notes(a, b, len(common), max(len(first), len(second)))
    return Comparison((str(path_a), str(path_b)), values, differences, changed, len(common), notes)


def _item(record: Mapping[str, Any]) -> BenchmarkItem:
    """Return the item of a record; results keep all that scoring needs, not the options."""
    return BenchmarkItem(**{key: record[key] for key in BenchmarkItem._fields if key != "options"})


def _answered(result: Mapping[str, Any]) -> dict[str, dict]:
    return {record["id"]: record for record in result["items"] if "answer" in record}


def _benchmark_of(result: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a result, to score answers again; its files need not be there."""
    # one of somebody's own code registers itself when its module is imported
    with suppress(ImportError):
        importlib.import_module(result["module"])
    cls = registry.get_benchmark_class(result["benchmark"])
    known = [field.name for field in dataclasses.fields(cls.Config)]  # not what another version had
    settings = {key: value for key, value in result["settings"].items() if key in known}
    return cls(cls.Config(**settings), result["benchmark"])


def _notes(a: Mapping[str, Any], b: Mapping[str, Any], num_common: int, most: int) -> list[str]:
    """Return what else is not the same, so that a difference may come from it."""
    notes = [f"only {num_common} items are in both, of {most}"] if num_common < most else []
    pairs = {
        key: (a.get(key), b.get(key))
        for key in ("control", "prompt", "data", "weights", "rules", "versions")
    }
    pairs |= {
        key: (a["settings"].get(key), value)
        for key, value in b["settings"].items()
        if key != "prompt"
    }
    return notes + [
        f"{key}: {old or 'none'} -> {new or 'none'}"
        for key, (old, new) in pairs.items()
        if old != new
    ]


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
        first, second = map(number, comparison.values[name])
        low, high = number(difference.low), number(difference.high)
        change = number(difference.value)
        lines.append(
            f"{name:24} {first:>9} {second:>9} {change:>9}   {low:>8} to {high:>8}  {difference.p_value:.3f}"
        )
    lines += ["", f"{len(comparison.changed)} items changed; lost most first"]
    for old, new in shown(comparison.changed, num_items):
        said = [
            textwrap.shorten(repr(record["answer"]), 80, placeholder=" ..") for record in (old, new)
        ]
        lines.append(
            f"  {old['id']}  {old['score']:.3f} -> {new['score']:.3f}  {said[0]} -> {said[1]}"
        )
    return "\n".join(lines)


def shown(changed: list, count: int) -> list:
    """Return at most `count` of the changed items: those at both ends."""
    half = count // 2
    return changed if len(changed) <= count else [*changed[:half], *changed[-half:]]


def comparison_page(comparison: Comparison, num_items: int = 1000) -> str:
    """Return the comparison as an HTML page with a table of the items that changed."""
    from minigpt4.datasets.sheet import visible

    names = "".join(
        f'<th class="n">{name}</th>' for name in ("A", "B", "B - A", "95 % from", "to", "p")
    )
    figures = [f"<tr><th>metric</th>{names}</tr>"]
    for name, change in comparison.differences.items():
        cells = [
            *map(number, (*comparison.values[name], change.value, change.low, change.high)),
            f"{change.p_value:.3f}",
        ]
        figures.append(
            f"<tr><td>{visible(name)}</td>{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        )
    items = [
        "<tr><th>item</th><th>question</th><th>right</th><th>A says</th><th>B says</th><th>A</th><th>B</th></tr>"
    ]
    for old, new in shown(comparison.changed, num_items):
        texts = [
            old["id"],
            old["question"],
            reference_text(old["reference"]),
            old["answer"],
            new["answer"],
        ]
        cells = [f"<td>{visible(text)}</td>" for text in texts]
        cells += [f"<td class=n>{record['score']:.3f}</td>" for record in (old, new)]
        items.append(
            f"<tr class={'lost' if new['score'] < old['score'] else 'won'}>{''.join(cells)}</tr>"
        )
    a, b = map(visible, comparison.names)
    body = [
        "<h1>Two results compared</h1>",
        f"<p>A: {a}</p><p>B: {b}</p><p>{comparison.num_common} common items</p>",
    ]
    body += [f"<p>{visible(note)}</p>" for note in comparison.notes]
    body.append(f'<div class="scroll"><table>{"".join(figures)}</table></div>')
    body += [f"<h2>{len(comparison.changed)} items changed, lost most first</h2>"]
    body.append(f'<div class="scroll"><table>{"".join(items)}</table></div>')
    return document("Two results compared", STYLE, body)
