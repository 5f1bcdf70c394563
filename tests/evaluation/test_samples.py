"""samples.jsonl and its page: no record is lost, and each sample shows its own answers."""

import json

from minigpt4.evaluation.samples import add_record, read_records, samples_page


def record(step, *answers, name="id"):
    samples = [
        {"id": name and f"{name}{number}", "prompt": "p", "answer": text, "reference": "r"}
        for number, text in enumerate(answers)
    ]
    return {"step": step, "loss": 1.0, "samples": samples}


def test_every_record_is_read_back_and_a_repeated_step_is_replaced(tmp_path):
    path, odd = tmp_path / "samples.jsonl", "one\u2028two\x85three"
    add_record(path, record(20, odd))
    add_record(path, record(10, "a"))
    with open(path, encoding="utf-8") as before:
        add_record(path, record(20, f"{odd}!"))
        # the former file is whole, not rewritten in place: a kill would leave it
        assert [json.loads(line)["step"] for line in before] == [10, 20]
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 30, "sam')
    assert read_records(path) == [record(10, "a"), record(20, f"{odd}!")]


def test_a_page_after_more_samples_were_asked_for():
    """A resumed run with a larger run.eval_samples: the record of a later step has fewer samples."""
    newest, later = record(10, "first now", "second now"), record(20, "first later")
    page = samples_page("title", [newest, later], newest["samples"], [(), ()])
    assert [page.count(text) for text in ("first now", "second now", "first later")] == [1, 1, 1]


def test_samples_without_ids_show_their_own_answers():
    newest = record(10, "a red cube", "a blue ball", name="")
    page = samples_page("title", [newest], newest["samples"], [(), ()])
    assert [page.count(text) for text in ("a red cube", "a blue ball")] == [1, 1]
