"""results.json: the metrics of one benchmark with intervals, and everything needed to check or repeat them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.versions import versions
from minigpt4.evaluation import metrics
from minigpt4.evaluation.answer_file import write_whole
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkItem
from minigpt4.evaluation.benchmarks.scores import Scores


class Run(NamedTuple):
    """What was asked and answered. This call asked `num_asked` items in `seconds`; the rest was answered before."""

    name: str  # the section of evaluation_datasets
    benchmark: Benchmark
    items: Sequence[BenchmarkItem]
    lines: Mapping[str, dict]  # the lines of the answer file, by id
    settings: Mapping[str, Any]  # what the answers depend on: prompt, control, data, ..
    seconds: float
    num_asked: int


def write_results(run: Run, folder: Path, details: Mapping[str, Any]) -> Path:
    """Score the answers and write results.json and results.html into the folder; return the path of results.json.

    An item with an error, such as an unreadable image, is counted as an error and left out of the metrics.
    Raises ValueError if items have no line, or if none has an answer.
    """
    from minigpt4.evaluation.page import results_page

    # A score over a part of the benchmark would be mistaken for one over the whole.
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
    answers = {item.id: run.lines[item.id]["answer"] for item in answered}
    scores = run.benchmark.score(answered, answers)

    content = _content(run, scores, len(answered), details)
    # Half a surrogate pair in an answer must not lose the results.
    path = folder / "results.json"
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    page = results_page(content, {item.id: item for item in run.items})
    write_whole(path.with_suffix(".html"), page.encode("utf-8", "backslashreplace"))
    return path


def _content(
    run: Run, scores: Scores, num_answered: int, details: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of results.json."""
    headline = run.benchmark.HEADLINE
    return {
        "name": run.name,
        "benchmark": run.benchmark.name,
        "module": type(run.benchmark).__module__,
        # the first metric if the images of the headline's items are all unreadable (MME's perception)
        "headline": headline if headline in scores.metrics else next(iter(scores.metrics)),
        "metrics": intervals(scores),
        "counts": {
            "items": len(run.items),
            "answered": num_answered,
            "errors": len(run.items) - num_answered,
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


def intervals(scores: Scores) -> dict[str, dict[str, float]]:
    """Return the value and the 95 % bootstrap interval of each metric, {name: {"value", "low", "high"}}."""
    found = {}
    for name, metric in scores.metrics.items():
        low, high = metrics.bootstrap(metric.rows, metric.of, stratum=metric.stratum)
        found[name] = {"value": metric.value(), "low": low, "high": high}
    return found


def read_results(path: str | Path) -> dict[str, Any]:
    """Return the content of a results.json. Raises OSError, or ValueError for another kind of file."""
    needed_keys = itemgetter("benchmark", "module", "metrics", "settings", "items")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        needed_keys(content)  # raises KeyError for one that is missing
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
    """Return the metrics of a results.json as lines of text, the headline metric marked with a star."""
    content = read_results(path)
    lines = [f"{full_name(content)}: {describe(content['counts'])}"]
    for name, metric in content["metrics"].items():
        mark = "*" if name == content["headline"] else " "
        lines.append(
            f"{mark} {name:24} {number(metric['value']):>9}   {number(metric['low'])} to {number(metric['high'])}"
        )
    return "\n".join([*lines, f"  {path}", f"  {path.with_suffix('.html')}"])


def full_name(content: Mapping[str, Any]) -> str:
    """Return the name of a result, with its control if it has one."""
    control = content["control"]
    return f"{content['name']}, control: {control}" if control else content["name"]


def describe(counts: Mapping[str, int]) -> str:
    """Return the counts of a result in words."""
    text = f"{counts['answered']} of {counts['items']} items answered, {counts['unparsable']} unparsable"
    if counts["errors"]:
        text += f"; {counts['errors']} could not be read and are NOT in the figures"
    return text


def number(value: float) -> str:
    """Return a value as text: four decimals, or one from 20 on, as MME's scores are in the hundreds."""
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.4f}"


def _record(item: BenchmarkItem, line: Mapping[str, str], scores: Scores) -> dict[str, Any]:
    """Return what results.json says of an item."""
    # Field 1 holds the original images; `item.images` of a BlankItem would create the grey ones.
    images = [str(image) if isinstance(image, (str, Path)) else "" for image in item[1]]
    record = {
        "id": item.id,
        "group": item.group,
        "images": images,
        "question": item.question,
        "reference": item.reference,
        "options": list(item.options),
    }
    record |= {key: line[key] for key in ("answer", "error") if key in line}
    if "answer" in line:
        record["score"] = round(float(scores.per_item[item.id]), 6)
    return record
