"""Batches that mix samples in the newest release's form with samples in ours."""

from minigpt4.datasets.datasets.collate import collate
from minigpt4.text.release_samples import from_release
from minigpt4.text.segments import Marked

TURNS = (("What is it?", "A dog."), ("Why?", "It was born so."))
SAMPLES = {
    "caption": {"text_input": "A dog."},
    "question": {"text_input": "Red.", "instruction": "Which colour?"},
    "turns": {"text_input": "A dog.", "turns": TURNS},
    "release": {"instruction_input": "<ImageHere> [vqa] Which?", "answer": "Blue."},
    "release turns": {"conv_q": "a#b", "conv_a": "c#d", "connect_sym": "#"},
    "both": {"instruction_input": "<ImageHere> Which?", "text_input": "Green."},
}


def test_a_sample_keeps_its_text_whatever_the_form_of_the_others():
    batch = from_release(collate([{"images": [], **sample} for sample in SAMPLES.values()]))
    texts = dict(zip(SAMPLES, batch["text_input"], strict=True))
    assert list(texts.values()) == ["A dog.", "Red.", "A dog.", "Blue.", "c", "Green."]
    instructions = dict(zip(SAMPLES, batch["instruction"], strict=True))
    assert instructions["question"] == "Which colour?"
    assert instructions["release"] == "<ImageHere> [vqa] Which?"
    is_marked = {name: isinstance(text, Marked) for name, text in instructions.items() if text}
    assert is_marked == {"question": False, "release": True, "both": True}
    turns = dict(zip(SAMPLES, batch["turns"], strict=True))
    assert {name: its for name, its in turns.items() if its} == {
        "turns": TURNS,
        "release turns": (("a", "c"), ("b", "d")),
    }
