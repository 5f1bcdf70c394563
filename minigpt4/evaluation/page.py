"""results.html: a self-contained page with the scores and with worst, best and random answers, images included."""

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.datasets.sheet import visible
from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = 12  # at most so many cards under each heading
SIDE = 336  # at most so many pixels on an image's longer side
STYLE = """:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:1rem auto;padding:0 1rem;max-width:84rem;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:0}h2{font-size:1.1rem;margin:1.6rem 0 .5rem}p{margin:.3rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.15rem 1rem .15rem 0;text-align:left;vertical-align:top;border-bottom:1px solid #8884}
.n{text-align:right;white-space:nowrap}td{overflow-wrap:break-word}
td:empty::before{content:"(empty)";opacity:.6}tr.headline{font-weight:700}
tr.lost td:first-child{border-left:4px solid #dc2626;padding-left:.5rem}
tr.won td:first-child{border-left:4px solid #16a34a;padding-left:.5rem}
.warning{border-left:4px solid #dc2626;padding-left:.6rem}
.cards{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
figure{border:1px solid #8886;border-radius:.5rem;margin:0;padding:.7rem;white-space:pre-wrap}
img{max-width:100%;height:auto;display:block;border-radius:.25rem;margin:0 0 .5rem}
img.small{image-rendering:pixelated;width:10rem}
dl{margin:0;display:grid;grid-template-columns:auto 1fr;gap:.1rem .7rem}dt{opacity:.65}dd{margin:0}
.id{opacity:.65;font-size:.85em}details{margin:.5rem 0}pre{white-space:pre-wrap}
i::before{content:"↵";font-style:normal;opacity:.6}dd:empty::before{content:"(empty)";opacity:.6}
"""


def results_page(content: Mapping[str, Any], items: Mapping[str, BenchmarkItem]) -> str:
    """Return the HTML of the page for the content of a results.json; `items`, by id, provide the images."""
    from minigpt4.evaluation.results import describe, full_name, number

    # The scores come first.
    title, prompt = full_name(content), content["prompt"]
    metric = content["metrics"][content["headline"]]
    interval = f"{number(metric['low'])} to {number(metric['high'])}, 95 %"
    note = f"{content['headline']} {number(metric['value'])} ({interval})"
    body = [
        f"<h1>{visible(title)}</h1>",
        f"<p><b>{visible(note)}</b></p>",
        f"<p>{describe(content['counts'])}</p>",
        f"<p>Prompt {visible(prompt['name'])}: {visible(prompt['text'])}</p>",
        f"<p>Rules: {visible(content['rules'])}</p>",
    ]
    if content["counts"]["errors"]:
        body.append(
            '<p class="warning">Items with an error are not in the figures; see the end of the page.</p>'
        )
    body.append(_table(content))

    # Then examples, items with errors last.
    groups = pick([record for record in content["items"] if "answer" in record])
    groups["errors"] = [record for record in content["items"] if "answer" not in record][:SHOWN]
    for heading, records in groups.items():
        if records:
            cards = "".join(_card(record, items[record["id"]]) for record in records)
            body.append(f'<h2>{heading} ({len(records)})</h2>\n<div class="cards">\n{cards}</div>')
    rest = {key: value for key, value in content.items() if key not in ("items", "metrics")}
    settings = visible(json.dumps(rest, indent=1))
    body.append(f"<details><summary>Settings, data, versions</summary><pre>{settings}</pre>")
    return document(title, STYLE, [*body, "</details>"])


def document(title: str, style: str, body: Sequence[str]) -> str:
    """Return an HTML page with a title, CSS and the elements of its body."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{visible(title)}</title>\n<style>{style}</style>\n"
        + "\n".join(body)
        + "\n</html>\n"
    )


def pick(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return {"worst", "best", "random": records}, no record twice, at most SHOWN each.

    Ties are broken at random, with a fixed seed.
    """
    ordered = list(records)
    random.Random(0).shuffle(ordered)
    ordered.sort(key=lambda record: record["score"])
    # A third each, rounded up, if there are few records.
    count = min(SHOWN, -(-len(ordered) // 3))
    worst, middle = ordered[:count], ordered[count:]
    best = middle[-count:][::-1]
    others = middle[: len(middle) - len(best)]
    return {
        "worst": worst,
        "best": best,
        "random": random.Random(1).sample(others, min(SHOWN, len(others))),
    }


def _table(content: Mapping[str, Any]) -> str:
    from minigpt4.evaluation.results import number

    rows = []
    for name, metric in content["metrics"].items():
        kind = " class=headline" if name == content["headline"] else ""
        cells = "".join(
            f'<td class="n">{number(metric[key])}</td>' for key in ("value", "low", "high")
        )
        rows.append(f"<tr{kind}><td>{visible(name)}</td>{cells}</tr>")
    head = '<tr><th>metric</th><th class="n">value</th><th class="n">95 % from</th><th class="n">to</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _card(record: Mapping[str, Any], item: BenchmarkItem) -> str:
    """Return one item as HTML; without its images if they could not be read."""
    terms = {
        "question": record["question"],
        "answer": record.get("answer"),
        "error": record.get("error"),
        "right": reference_text(record["reference"]),
        "score": f"{record['score']:.3f}" if "score" in record else None,
    }
    listed = "".join(
        f"<dt>{name}</dt><dd>{visible(str(value))}</dd>"
        for name, value in terms.items()
        if value is not None
    )
    images = "".join(map(image_element, item.images)) if "answer" in record else ""
    return (
        f'<figure>{images}<div class="id">{visible(record["id"])}</div><dl>{listed}</dl></figure>\n'
    )


def reference_text(reference: Any) -> str:
    """Return a reference as text; equal answers of several annotators are shown once, with their count."""
    if isinstance(reference, dict):
        return "; ".join(
            f"{name}: {reference_text(value)}" for name, value in reference.items() if value
        )
    if isinstance(reference, list) and all(isinstance(value, str) for value in reference):
        counts = {value: reference.count(value) for value in reference}
        return " | ".join(
            value if count == 1 else f"{value} ({count})" for value, count in counts.items()
        )
    return reference if isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)


def image_element(source: "str | Path | Image") -> str:
    """Return an <img> element with the image's data inside; a small image is shown enlarged, its pixels sharp."""
    from minigpt4.conversation.images import open_image

    image = open_image(source)
    is_small = max(image.size) < SIDE / 2
    image.thumbnail((SIDE, SIDE))
    buffer, kind = io.BytesIO(), "png" if is_small else "jpeg"
    image.save(buffer, kind)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img{" class=small" if is_small else ""} alt="" src="data:image/{kind};base64,{data}">'
