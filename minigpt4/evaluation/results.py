"""results.json: the figures of one benchmark with intervals, and all that is needed to believe or repeat them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.versions import versions
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from minigpt4.evaluation.benchmarks.scores import Scores


class Run(NamedTuple):
    """What was asked and answered. `num_asked`: in this call, in so many `seconds`; the rest was there."""

    name: str  # of the section
    benchmark: Benchmark
    items: Sequence[BenchmarkItem]
    lines: Mapping[str, dict]  # of the answer file, by id
    settings: Mapping[str, Any]  # all that an answer depends on
    seconds: float
    num_asked: int


def write_results(run: Run, folder: Path, details: Mapping[str, Any]) -> Path:
    """Score the answers and write results.json and results.html into the folder; return the path of the first.

    An item whose image could not be read has no answer: it is counted as an error and left out of the figures.
    Raises ValueError if items have no line, or none has an answer.
    """
    from minigpt4.evaluation.page import results_page

    # A figure over a part of the benchmark would pass for one over the whole.
    missing = [item.id for item in run.items if item.id not in run.lines]
    if missing:
        raise ValueError(
            f"{run.name}: {len(missing)} of {len(run.items)} items have no answer, first '{missing[0]}'; "
            f"do all ranks write to the same '{folder}'?"
        )
    # An unreadable image is an error of the data, not a wrong answer of the model.
    answered = [item for item in run.items if "answer" in run.lines[item.id]]
    if not answered:
        raise ValueError(
            f"{run.name}: no item has an answer; the first error: {run.lines[run.items[0].id]['error']}"
        )
    scores = run.benchmark.score(
        answered, {item.id: run.lines[item.id]["answer"] for item in answered}
    )

    content = {
        "name": run.name,
        "benchmark": run.benchmark.name,
        "module": type(run.benchmark).__module__,
        "headline": run.benchmark.HEADLINE,
        "metrics": intervals(scores),
        "counts": {
            "items": len(run.items),
            "answered": len(answered),
            "errors": len(run.items) - len(answered),
            "unparsable": scores.unparsable,
        },
        "rules": run.benchmark.RULES,
        "control": run.settings["control"],
        "prompt": run.benchmark.prompt()._asdict(),
        "settings": dataclasses.asdict(run.benchmark.cfg),
        "data": run.settings["data"],
        "versions": versions(),
        "seconds": round(run.seconds, 1),
        "asked_in_this_call": run.num_asked,
        **details,
        "items": [_record(item, run.lines[item.id], scores) for item in run.items],
    }
    # Half a surrogate pair in an answer must not lose the results.
    path = folder / "results.json"
    path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    page = results_page(content, {item.id: item for item in run.items})
    path.with_suffix(".html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def intervals(scores: Scores) -> dict[str, dict[str, float]]:
    """Return the value of each metric and its 95 % bootstrap interval, {"value", "low", "high"}."""
    found = {}
    for name, metric in scores.metrics.items():
        low, high = metrics.bootstrap(metric.rows, metric.of)
        found[name] = {"value": metric.value(), "low": low, "high": high}
    return found


def read_results(path: str | Path) -> dict[str, Any]:
    """Return a results.json. Raises OSError, or ValueError for another kind of file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        (
            content["benchmark"],
            content["module"],
            content["metrics"],
            content["settings"],
            content["items"],
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no file at '{path}'; expected a results.json of evaluate.py"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' is no results.json of evaluate.py ({type(error).__name__}: {error})"
        ) from error
    return content


def summary(path: Path) -> str:
    """Return the figures of a results.json as lines of text."""
    content = read_results(path)
    counts = content["counts"]
    lines = [
        f"{content['name']}{content['control'] and ', control: ' + content['control']}: {describe(counts)}"
    ]
    for name, metric in content["metrics"].items():
        mark = "*" if name == content["headline"] else " "
        lines.append(
            f"{mark} {name:24} {number(metric['value']):>9}   {number(metric['low'])} to {number(metric['high'])}"
        )
    return "\n".join([*lines, f"  {path}", f"  {path.with_suffix('.html')}"])


def describe(counts: Mapping[str, int]) -> str:
    """Return the counts of a result in words."""
    text = f"{counts['answered']} of {counts['items']} items answered, {counts['unparsable']} unparsable"
    return text + (
        f"; {counts['errors']} could not be read and are NOT in the figures"
        if counts["errors"]
        else ""
    )


def number(value: float) -> str:
    """Return a figure as it is shown: four digits behind the point, one for MME's hundreds."""
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.4f}"


def _record(item: BenchmarkItem, line: Mapping[str, str], scores: Scores) -> dict[str, Any]:
    # the second field, as a control makes its images anew
    images = [str(image) if isinstance(image, (str, Path)) else "" for image in item[1]]
    record = {"id": item.id, "group": item.group, "images": images, "question": item.question}
    record |= {"reference": item.reference} | {
        key: line[key] for key in ("answer", "error") if key in line
    }
    return record | (
        {"score": round(float(scores.per_item[item.id]), 6)} if "answer" in line else {}
    )
