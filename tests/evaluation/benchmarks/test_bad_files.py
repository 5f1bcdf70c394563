"""Each mistake in a benchmark's section or files gives one message, before a model is loaded."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from minigpt4.common.config import Config, ConfigError
from minigpt4.evaluation.prompts import FILE, find_prompt, shipped_prompts
from minigpt4.evaluation.run import open_benchmarks
from tests.evaluation.benchmarks import official
from tests.evaluation.benchmarks.official import opened


def edit(path, change):
    """Change the content of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def without(key):
    return lambda rows: rows[0].pop(key) and None


POPE, OWN = "coco/coco_pope_random.json", "questions.jsonl"
QUESTIONS = "annotations/v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS = "annotations/v2_mscoco_val2014_annotations.json"
CAPTIONS = "annotations/captions_val2014.json"
INSTANCES = "annotations/instances_val2014.json"

FAULTS = {
    "missing images": (
        "pope",
        lambda r: (r / "images/COCO_val2014_000000000001.jpg").unlink(),
        "1 of 2 images are not there",
    ),
    "no image folder": (
        "gqa",
        lambda r: (r / "images").rename(r / "pictures"),
        "2 of 2 images are not there: '",
    ),
    "duplicate ids": (
        "pope",
        lambda r: (r / POPE).write_text((r / POPE).read_text() * 2),
        "the id 'random/1' is there 2 times",
    ),
    "id without image": (
        "coco_caption",
        lambda r: edit(r / CAPTIONS, lambda c: c["images"].pop() and None),
        "no image '9' among",
    ),
    "no JSON": (
        "gqa",
        lambda r: (r / "testdev_balanced_questions.json").write_text("<html>"),
        "is no JSON",
    ),
    "cut off": (
        "vizwiz",
        lambda r: (r / "Annotations/val.json").write_text('[{"image": "a'),
        "was it downloaded whole",
    ),
    "no UTF-8": (
        "vizwiz",
        lambda r: (r / "Annotations/val.json").write_bytes(b"\xff\xfe\x00x"),
        "is no UTF-8 text",
    ),
    "other form": (
        "vqav2",
        lambda r: (r / QUESTIONS).write_text("{}"),
        "'questions' is missing (there are: none)",
    ),
    "not rows": (
        "vqav2",
        lambda r: (r / QUESTIONS).write_text('{"questions": [7]}'),
        "questions[0]: expected a mapping, found a number",
    ),
    "no list": (
        "vizwiz",
        lambda r: (r / "Annotations/val.json").write_text("7"),
        "expected a mapping, found a number",
    ),
    "empty": (
        "pope",
        lambda r: [
            (r / f"coco/coco_pope_{s}.json").write_text("")
            for s in ("random", "popular", "adversarial")
        ],
        "has no item",
    ),
    "no answers": (
        "vqav2",
        lambda r: edit(r / ANSWERS, lambda c: c["annotations"][0].pop("answers") and None),
        "'answers' is missing or empty",
    ),
    "other split": (
        "vqav2",
        lambda r: edit(r / ANSWERS, lambda c: c["annotations"].pop() and None),
        "question 422 has no entry in",
    ),
    "no annotations": (
        "vqav2",
        lambda r: (r / ANSWERS).unlink(),
        "a folder without v2_mscoco*val2014*annotations*.json or *mscoco*val2014*annotations*.json",
    ),
    "two files fit": (
        "coco_caption",
        lambda r: official.write_json(r / "annotations/captions_train2014.json", {}),
        "2 files in",
    ),
    "wrong label": (
        "pope",
        lambda r: (r / POPE).write_text((r / POPE).read_text().replace('"yes"', '"maybe"')),
        "line 1: 'label' is 'maybe'",
    ),
    "bad line": (
        "own_jsonl",
        lambda r: (r / OWN).write_text((r / OWN).read_text() + "{"),
        "line 4 is no JSON",
    ),
    "no answer": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": "a.jpg"}'),
        "line 1: 'answer' is missing (there are: image)",
    ),
    "empty answers": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": "a.jpg", "answers": []}'),
        "expected texts, at least one",
    ),
    "one option": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": "a.jpg", "answer": "x", "options": ["x"]}'),
        "line 1: 'options' holds ['x']; expected two texts or more, all different",
    ),
    "the same option twice": (
        "own_jsonl",
        lambda r: (r / OWN).write_text(
            '{"image": "a.jpg", "answer": "x", "options": ["x", "y", "x"]}'
        ),
        "expected two texts or more, all different",
    ),
    "an option that is no text": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": "a.jpg", "answer": "x", "options": ["x", 7]}'),
        "expected two texts or more, all different",
    ),
    "an answer that is no option": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": "a.jpg", "answer": "z", "options": ["x", "y"]}'),
        "line 1: none of the answers ['z'] is among the options ['x', 'y']",
    ),
    "null image": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"image": null, "answer": "x"}'),
        "'image' is null; expected text",
    ),
    "null id": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"id": null, "image": "a", "answer": "x"}'),
        "'id' is null",
    ),
    "null question": (
        "own_jsonl",
        lambda r: (r / OWN).write_text('{"question": null, "image": "a", "answer": "x"}'),
        "'question' is null",
    ),
    "no category": (
        "chair",
        lambda r: edit(r / INSTANCES, lambda c: c["categories"].pop(0) and None),
        "there is no category 1",
    ),
    "no caption": (
        "chair",
        lambda r: edit(r / CAPTIONS, lambda c: c["annotations"].pop() and None),
        "image 3 has no caption",
    ),
    "one question": (
        "mme",
        lambda r: (r / "MME_Benchmark_release_version/existence/0.txt").write_text("Is it?\tYes\n"),
        "has 1 lines; expected two",
    ),
    "no tab": (
        "mme",
        lambda r: (r / "MME_Benchmark_release_version/existence/0.txt").write_text("a Yes\nb No"),
        "line 1: expected a question, a tab",
    ),
    "no size": (
        "refcoco",
        lambda r: edit(r / "refcoco_val.json", without("width")),
        "[0]: 'width' is missing",
    ),
    "no label": (
        "vsr",
        lambda r: (r / "vsr/test.jsonl").write_text('{"image": "a", "caption": "b"}'),
        "'label' is missing",
    ),
    "another label": (
        "vsr",
        lambda r: (r / "vsr/test.jsonl").write_text('{"image": "a", "caption": "b", "label": 2}'),
        "'label' is 2; expected 0 or 1",
    ),
    "no test.jsonl": (
        "vsr",
        lambda r: (r / "vsr/test.jsonl").rename(r / "vsr/other"),
        "(found a folder without test.jsonl or *vsr*.json*)",
    ),
    "one choice": (
        "iconqa",
        lambda r: edit(
            r / "iconqa/choose_text_val.json", lambda c: c[0].update(choices=["circle"])
        ),
        "'choices' holds ['circle']; expected two texts or more",
    ),
    "no such choice": (
        "iconqa",
        lambda r: edit(r / "iconqa/choose_text_val.json", lambda c: c[0].update(answer=2)),
        "'answer' is 2; expected the place of a choice, 0 to 1",
    ),
    "a label of text": (
        "hm",
        lambda r: (r / "hm/dev_seen.jsonl").write_text('{"img": "a", "text": "b", "label": "1"}'),
        "'label' is text; expected a number",
    ),
    "no box": (
        "refcoco",
        lambda r: edit(r / "refcoco_val.json", lambda c: c[0].update(bbox=[1, 2])),
        "box of 'val/0': found [1, 2]; expected 4 numbers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_files(fault, tmp_path):
    name, spoil, message = FAULTS[fault]
    section = getattr(official, name)(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        opened(name, tmp_path, lambda root: section)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


# the section of a configuration


def config(*options):
    """Return the Config of evaluate.py; the model's files need not exist, as it is not loaded."""
    args = Namespace(cfg_path="eval_configs/embedded_eval.yaml", options=list(options))
    return Config(args, unopened=["model.*"])


def options_of(name, root, **more):
    """Return the options of a section with the official files of a benchmark."""
    section = {"img_path": root / "images", **getattr(official, name)(root), **more}
    return [f"evaluation_datasets.{name}.{key}={value}" for key, value in section.items()]


def test_sections_are_typed_and_keep_the_keys_of_the_release(tmp_path):
    keys = options_of("gqa", tmp_path, batch_size=10, max_new_tokens=20)
    unused = ["evaluation_datasets.vsr.eval_file_path=/path/to/eval/annotation/path"]
    ((name, (benchmark, items)),) = open_benchmarks(config(*keys, *unused), ["gqa", "gqa"]).items()
    assert (name, benchmark.cfg.batch_size, benchmark.cfg.max_new_tokens, len(items)) == (
        "gqa",
        10,
        20,
        2,
    )


def test_a_section_of_another_name_states_its_benchmark(tmp_path):
    options = [option.replace("own_jsonl", "mine") for option in options_of("own_jsonl", tmp_path)]
    found = open_benchmarks(
        config(*options, "evaluation_datasets.mine.benchmark=own_jsonl"), ["mine"]
    )
    assert found["mine"].benchmark.name == "own_jsonl"


def test_all_problems_of_all_benchmarks_are_reported_at_once(tmp_path):
    options = options_of("gqa", tmp_path, prompt="shrt_answer", batch_size="many")
    options += options_of("pope", tmp_path, prompt="describe")
    options += options_of("own_jsonl", tmp_path, metric="exact")
    options += [
        "evaluation_datasets.vqav2.img_path=/path/to/images",
        "evaluation_datasets.mme.eval_file_path=absent",
    ]
    options += ["evaluation_datasets.vizwiz=7", "evaluation_datasets.okvqa.eval_file_pth=x"]
    names = ["gqa", "pope", "own_jsonl", "vqav2", "mme", "vizwiz", "okvqa", "pop"]
    with pytest.raises(ConfigError) as error:
        open_benchmarks(config(*options), names)
    said = dict(str(problem).split(": ", 1) for problem in error.value.problems)
    expected = {
        "gqa.batch_size": "'many' (str) is not an integer (--options)",
        "pope": "prompt: 'Describe this image in detail.' has no {question}, but this benchmark asks a question",
        "own_jsonl": "metric: unknown name 'exact'; known: exact_match, vqa_accuracy, caption",
        "vqav2.eval_file_path": "missing; it has no default",
        "mme": "eval_file_path: no subtask in 'absent' (found nothing); MME has existence, count",
        "vizwiz": "7 (int) is no section; write its keys below it",
        "okvqa.eval_file_pth": "unknown key. Did you mean 'eval_file_path'?",
        "pop": "unknown benchmark 'pop'; known: chair, coco_caption",
    }
    for key, message in expected.items():
        assert said[f"evaluation_datasets.{key}"].startswith(message), said
    assert "Did you mean 'pope'?" in said["evaluation_datasets.pop"]
    with pytest.raises(ConfigError, match=r"evaluation_datasets: 'pope' \(str\) is no section"):
        config("evaluation_datasets=pope")


def test_relative_paths_are_resolved_like_others_of_a_configuration(tmp_path):
    options = options_of("gqa", tmp_path / "beside")
    text = Path("eval_configs/embedded_eval.yaml").read_text()
    sections = {"gqa": {"eval_file_path": "beside", "img_path": "beside/images"}}
    (tmp_path / "eval.yaml").write_text(
        f"{text}\n{yaml.safe_dump({'evaluation_datasets': sections})}"
    )
    cfg = Config(Namespace(cfg_path=str(tmp_path / "eval.yaml"), options=[]), unopened=["model.*"])
    assert len(options) == 2 and len(open_benchmarks(cfg, ["gqa"])["gqa"].items) == 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("shrt_answer", "unknown name 'shrt_answer'; did you mean 'short_answer'?"),
        ("xyzzy", "unknown name 'xyzzy'; known: caption"),
        ("Café-7/2", "'Café-7/2' has no {question}"),
        ("caption/9", "unknown name 'caption/9'; did you mean 'caption/1'?"),
        ("xyzzy", "yes_no/1. A text of your own is more than one word"),
        ("What is this?", "'What is this?' has no {question}"),
        ("", "unknown name ''"),
    ],
)
def test_a_prompt_that_does_not_fit(prompt, message, tmp_path):
    options = options_of("gqa", tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_benchmarks(config(*options, f"evaluation_datasets.gqa.prompt={prompt}"), ["gqa"])


def test_prompts_are_versioned():
    prompts = shipped_prompts()
    for line in FILE.read_text().splitlines():
        if not line.startswith("#"):
            name, text = line.split(": ", 1)
            assert re.fullmatch(r"\w+/\d+", name) and prompts[name] == (name, text)
    assert find_prompt("short_answer", True).name == "short_answer/1"
    with pytest.raises(ValueError, match="this benchmark has no questions"):
        find_prompt("short_answer", False)


@pytest.mark.parametrize(
    "text",
    [
        "Only a word: {question}",
        "{question}",
        "{question}\nAnswer:",
        "{question}请用一个词回答。",
        "请描述这张图片。",
        "图片",
        "Describe!",
    ],
)
def test_a_text_of_the_users_own(text):
    assert find_prompt(text, "{question}" in text) == ("own", text)
