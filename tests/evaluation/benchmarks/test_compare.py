"""The page of results, and the comparison of two results."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from minigpt4.evaluation.compare import compare, comparison_page, comparison_text
from minigpt4.evaluation.page import pick
from minigpt4.evaluation.run import run_benchmarks
from tests.evaluation.benchmarks import official
from tests.evaluation.benchmarks.official import opened

HOSTILE = 'red <script>alert(1)</script> & "q"\nnext\u202eline'


def results(root, folder, texts, name="own_jsonl", writer=None, **settings):
    """Return the results.json for answers in the order of the items; None stands for an image that cannot be read."""
    benchmark = opened(name, root, writer, **settings)
    said = dict(zip((item.id for item in benchmark.items), texts, strict=True))
    wrong = {"error": "image 'x': broken"}

    def answer(items, cfg):
        return (
            {"id": item.id, **({"answer": said[item.id]} if said[item.id] is not None else wrong)}
            for item in items
        )

    return run_benchmarks({name: benchmark}, root / folder, answer)[name]


class Page(HTMLParser):
    """Parses a page as a browser does: `texts` by element, `images`, and the elements that are still open."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.images, self.addresses = [], {}, [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "img":
            self.images.append(
                Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
            )
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data


def test_the_page_needs_no_network_and_shows_all_text_as_it_is(tmp_path):
    path = results(tmp_path, "a", [HOSTILE, "green", None])
    page = Page(path.with_suffix(".html").read_text())
    assert not page.open and all(address.startswith("data:image/") for address in page.addresses)
    assert (
        page.texts["h2"] == ["worst (1)", "best (1)", "errors (1)"] and "script" not in page.texts
    )
    assert [image.size for image in page.images] == [(40, 30)] * 2
    red, green, blue = page.images[0].getpixel((5, 5))
    assert red > 200 and green < 50 and blue < 50  # the worst is about a.jpg, drawn red
    shown = " ".join(page.texts["dd"])
    assert (
        "alert(1)" in shown
        and "[U+202E]" in shown
        and "Green. | lime" in shown
        and "image 'x': broken" in shown
    )


def test_worst_and_best_are_chosen_by_score_and_no_item_is_shown_twice():
    records = [{"id": str(n), "score": n // 10} for n in range(100)]
    chosen = pick(records)
    assert {record["score"] for record in chosen["worst"]} == {0, 1} and len(chosen["worst"]) == 12
    assert [record["score"] for record in chosen["best"]] == [9] * 10 + [8] * 2
    ids = [record["id"] for group in chosen.values() for record in group]
    assert len(ids) == len(set(ids)) == 36 and pick(records) == chosen
    assert [record["id"] for record in chosen["worst"]] != [str(n) for n in range(12)]
    assert {name: len(group) for name, group in pick(records[:1]).items()} == {
        "worst": 1,
        "best": 0,
        "random": 0,
    }


def test_what_changed_between_two_results(tmp_path):
    a = results(tmp_path, "a", ["red", "blue", "the first"])
    b = results(tmp_path, "b", ["reddish", "green", "the first"], prompt="Look. {question}")
    found = compare(a, b)
    assert found.num_common == 3 and found.values["score"] == pytest.approx((2 / 3, 2 / 3))
    assert found.differences["score"].value == 0 and found.differences["score"].p_value == 1
    assert found.differences["hard/score"].value == 1
    assert [(old["id"], new["answer"]) for old, new in found.changed] == [
        ("first", "reddish"),
        ("2", "green"),
    ]
    assert any(note.startswith("prompt: {'name': 'question/1'") for note in found.notes)
    text = comparison_text(found)
    assert "first  1.000 -> 0.000  'red' -> 'reddish'" in text
    assert re.search(r"^score +0\.6667 +0\.6667 +0\.0000", text, re.M)
    page = Page(comparison_page(found))
    assert not page.open and not page.addresses and "reddish" in page.texts["td"]
    assert compare(a, a).changed == [] and compare(a, a).notes == []


@pytest.mark.parametrize("writer", official.WRITERS, ids=lambda writer: writer.__name__)
def test_results_of_every_benchmark_can_be_scored_again_from_results_json_alone(writer, tmp_path):
    name = writer.__name__
    benchmark = opened(name, tmp_path)
    texts = [["no", "a dog", "yes"][number % 3] for number in range(len(benchmark.items))]
    a = results(tmp_path, "a", texts, name)
    b = results(tmp_path, "b", texts[1:] + texts[:1], name)
    found = compare(a, b)
    for place, path in enumerate((a, b)):
        stored = {
            key: metric["value"] for key, metric in json.loads(path.read_text())["metrics"].items()
        }
        assert {key: values[place] for key, values in found.values.items()} == pytest.approx(stored)
    assert comparison_text(found).count("\n") >= len(found.values)


def test_results_with_different_settings_are_scored_by_one_rule(tmp_path):
    a = results(tmp_path, "a", ["red", "green", "the first"])
    b = results(tmp_path, "b", ["red", "green", "the first"], metric="caption", max_new_tokens=7)
    found = compare(a, b)
    assert found.changed == [] and "CIDEr-D" in found.values
    assert {"metric: exact_match -> caption", "max_new_tokens: 20 -> 7"} <= set(found.notes)
    content = json.loads(b.read_text())
    content["settings"]["of_another_version"] = True
    b.write_text(json.dumps(content))
    assert "of_another_version: none -> True" in compare(a, b).notes


def test_a_setting_that_is_0_is_not_called_none(tmp_path):
    a = results(tmp_path, "a", ["red", "green", "x"])
    b = results(tmp_path, "b", ["red", "green", "x"], temperature=0.5, seed=3)
    assert {"temperature: 0.0 -> 0.5", "seed: 0 -> 3"} <= set(compare(a, b).notes)


def test_options_are_kept_in_results(tmp_path):
    a = results(tmp_path, "a", ["-", "C++"], writer=official.signs)
    b = results(tmp_path, "b", ["+", "C"], writer=official.signs)
    assert [(old["id"], new["score"]) for old, new in compare(a, b).changed] == [("2", 0), ("1", 1)]


def test_results_with_few_or_no_items_in_common(tmp_path):
    a = results(tmp_path, "a", ["red", "green", "x"])
    b = results(tmp_path, "b", ["red", None, "x"])
    found = compare(a, b)
    assert found.num_common == 2 and "only 2 items are in both, of 3" in found.notes
    content = json.loads(b.read_text())
    for record in content["items"]:
        record["id"] += "?"
    b.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="have no answered item in common"):
        compare(a, b)


def test_results_that_cannot_be_compared_are_refused(tmp_path):
    a = results(tmp_path, "a", ["red", "green", "x"])
    other = results(tmp_path, "gqa", ["yes", "no"], "gqa")
    with pytest.raises(
        ValueError, match=r"is of own_jsonl, '.*' of gqa; expected the same benchmark"
    ):
        compare(a, other)
    content = json.loads(a.read_text())
    content["items"][0]["reference"] = ["blue"]
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="item 'first' has different references"):
        compare(a, tmp_path / "changed.json")
    with pytest.raises(
        FileNotFoundError, match=r"no file at '.*absent\.json'; expected a results.json"
    ):
        compare(a, tmp_path / "absent.json")
    for text in ("notes", "[]", '{"benchmark": "gqa"}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json' is no results\.json"):
            compare(a, tmp_path / "wrong.json")
