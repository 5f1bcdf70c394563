"""Any value of an official file may be replaced by any other: the result is a message or scores, never another error."""

import json
import random

import pytest

from tests.evaluation.benchmarks import official
from tests.evaluation.benchmarks.official import opened

VALUES = [None, 7, -1.5, float("nan"), "x", "", [], {}, [None], [[1]], {"a": 1}, True]
SAID = "Yes, a dog {<10><10><30><30>}"


def places(node, path=()):
    """Yield the path of every value in parsed JSON."""
    yield path
    for key in (
        node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    ):
        yield from places(node[key], (*path, key))


def with_value(node, path, value):
    if not path:
        return value
    parent = node
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return node


def damage(file, rng):
    """Replace a value in a file of JSON or JSON lines; return a description of the change."""
    text = file.read_text()
    is_lines = file.suffix == ".jsonl" or "pope" in file.name
    content = [json.loads(line) for line in text.splitlines()] if is_lines else json.loads(text)
    path, value = rng.choice(list(places(content))[is_lines:]), rng.choice(VALUES)
    content = with_value(content, path, value)
    file.write_text("\n".join(map(json.dumps, content)) if is_lines else json.dumps(content))
    return f"{file.name} {path}: {value!r}"


@pytest.mark.parametrize(
    "writer", [w for w in official.WRITERS if w is not official.mme], ids=lambda w: w.__name__
)
def test_a_damaged_value_gives_a_message_or_is_harmless(writer, tmp_path):
    rng = random.Random(writer.__name__)
    refused = 0
    for trial in range(25):
        section = writer(tmp_path / str(trial))
        done = damage(rng.choice(sorted((tmp_path / str(trial)).rglob("*.json*"))), rng)
        try:
            benchmark, items = opened(
                writer.__name__, tmp_path / str(trial), lambda _, section=section: section
            )
        except (ValueError, OSError) as error:
            refused += 1
            assert str(tmp_path) in str(error), done
        else:
            scores = benchmark.score(items, {item.id: SAID for item in items})
            assert all(metric.value() == metric.value() for metric in scores.metrics.values()), done
    assert refused
