"""The drawn world's benchmarks: they give the figures of the quickstart's own evaluation."""

from pathlib import Path

import pytest

from minigpt4.evaluation.run import make_benchmark
from minigpt4.quickstart import evaluate
from minigpt4.quickstart.drawn_world import DrawnWorld


def opened(name, **settings):
    benchmark = make_benchmark(name, {"num_images": 30, **settings})
    return benchmark, benchmark.checked_items()


def figures(benchmark, items, texts):
    scores = benchmark.score(
        items, {item.id: text for item, text in zip(items, texts, strict=True)}
    )
    return {name: round(metric.value(), 4) for name, metric in scores.metrics.items()}, scores


@pytest.mark.parametrize("split", ["held_out", "left_out"])
def test_descriptions_score_as_in_the_report(split):
    benchmark, items = opened("drawn_world", split=split)
    tests = evaluate.draw_tests(split, 30)
    assert [item.images[0].tobytes() for item in items] == [test.image.tobytes() for test in tests]
    right = [item.reference for item in items]
    found, scores = figures(benchmark, items, right)
    assert found == evaluate.score(tests, right) == dict.fromkeys(found, 1.0) and set(
        scores.per_item.values()
    ) == {1.0}
    mixed = [*right[1:15], "", "A small red circle.", *right[17:], right[0]]
    found, scores = figures(benchmark, items, mixed)
    assert (
        found == evaluate.score(tests, mixed) and 0 < found["shape"] < 1 and scores.unparsable == 1
    )


def test_questions_score_as_in_the_report():
    benchmark, items = opened("drawn_questions")
    tests = evaluate.draw_tests("held_out", 30)
    assert [item.question for item in items] == [test.question.text for test in tests]
    texts = [
        test.question.answer if number % 3 else "a blue star" for number, test in enumerate(tests)
    ]
    theirs = evaluate.score_questions(tests, texts)
    found, _ = figures(benchmark, items, texts)
    assert found.pop("accuracy") == theirs.pop("all")
    assert found == {f"{kind}/accuracy": value for kind, value in theirs.items()}


@pytest.mark.parametrize("settings", [{"split": "stage1"}, {"num_images": 0}])
def test_no_images_of_training(settings):
    with pytest.raises(
        ValueError, match="expected split: one of held_out, left_out; num_images: at least 1"
    ):
        opened("drawn_world", **settings)


def test_it_registers_itself_by_the_configuration():
    assert DrawnWorld.HEADLINE == "exact"
    text = Path("eval_configs/embedded_eval.yaml").read_text()
    assert "imports: [minigpt4.quickstart.drawn_world]" in text
