"""The plugin in the real lmms-eval: it is found by its entry point and answers as evaluate.py does."""

import json
import math

import pytest

from tests.evaluation.harnesses.conftest import CFG_PATH, MAX_NEW_TOKENS

pytestmark = pytest.mark.registry

CODE = """
from pathlib import Path
from PIL import Image

FOLDER = Path({folder!r})

def images(doc):
    return [Image.open(FOLDER / name).convert("RGB") for name in doc["images"]]

def right(doc, results):
    return {{"right": float(results[0] == doc["answer"])}}
"""
TASK = """
task: own_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function code.images
doc_to_text: question
doc_to_target: answer
metadata: [{{version: 0}}]
"""
GENERATED = """
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, until: []}}
process_results: !function code.right
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
RANKED = """
doc_to_choice: options
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(items, tmp_path_factory):
    """Return the folder of two lmms-eval tasks: own_items with generated answers, and own_ranked."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "code.py").write_text(CODE.format(folder=str(items)))
    task = TASK.format(name="items", kind="generate_until", file=items / "items.jsonl")
    (folder / "items.yaml").write_text(task + GENERATED.format(tokens=MAX_NEW_TOKENS))
    task = TASK.format(name="ranked", kind="multiple_choice", file=items / "ranked.jsonl")
    (folder / "ranked.yaml").write_text(task + RANKED)
    return folder


@pytest.fixture(scope="module")
def lmms_eval(harness, ask, settings, tasks, tmp_path_factory):
    """Return a function that returns lmms-eval's log of each document, by task and id."""

    def logged(names, *options):
        output = tmp_path_factory.mktemp("lmms")
        model_args = ",".join(
            f"{key}={value}" for key, value in ({"cfg_path": CFG_PATH} | settings).items()
        )
        command = [
            harness("lmms-eval"),
            "-m",
            "lmms_eval",
            "--model",
            "minigpt4",
            "--model_args",
            model_args,
        ]
        command += [
            "--tasks",
            ",".join(names),
            "--include_path",
            tasks,
            "--batch_size",
            "4",
            "--device",
            "cpu",
        ]
        command += [*options, "--log_samples", "--output_path", output]
        said = ask([*map(str, command)], HF_HOME=str(output / "home"))
        samples = {}
        for name in names:
            paths = list(output.rglob(f"*_samples_{name}.jsonl"))
            assert len(paths) == 1, said[-8000:]
            lines = map(json.loads, paths[0].read_text().splitlines())
            samples[name] = {str(line["doc_id"]): line for line in lines}
        return samples

    return logged


def answers_of(lines):
    return {name: line["filtered_resps"] for name, line in lines.items()}


def test_the_chat_form_answers_as_evaluate(lmms_eval, evaluated):
    expected = evaluated("items.jsonl")
    samples = lmms_eval(["own_items"])
    assert answers_of(samples["own_items"]) == expected
    assert len(expected) == 12 and len(set(expected.values())) > 5


def test_the_simple_form_answers_and_ranks_as_evaluate(lmms_eval, evaluated):
    samples = lmms_eval(["own_items", "own_ranked"], "--force_simple")
    assert answers_of(samples["own_items"]) == evaluated("items.jsonl")
    options = ["the old wall", "water", "no"]
    best = {}
    for name, line in samples["own_ranked"].items():
        losses = [float(loss) for loss, _ in line["filtered_resps"]]
        best[name] = options[losses.index(min(losses))]
        assert float(line["acc"]) == float(best[name] == line["target"])
    assert best == evaluated("ranked.jsonl", ranking="mean") and len(best) == 12


RANK = """
import json, sys
from lmms_eval.api.instance import Instance
from PIL import Image
from minigpt4.evaluation.lmms.models import MiniGPT4Simple

model = MiniGPT4Simple(sys.argv[1], batch_size=4, device="cpu", **json.loads(sys.argv[2]))
model.task_dict = {"task": {"test": [{}]}}
chat, encoded, limits = model.chat, [], []
chat.stopping_criteria = [lambda ids, scores: ids.shape[1] >= 3]
encode_images, answer_batch = chat.encode_images, chat.answer_batch

def encode_and_note(images):
    encoded.append(len(images))
    return encode_images(images)

def answer_and_note(*args, **sampling):
    limits.append(sampling["max_new_tokens"])
    return answer_batch(*args, **sampling)

chat.encode_images, chat.answer_batch = encode_and_note, answer_and_note

def requests(*continuations):
    def images(doc):
        return [Image.new("RGB", (8, 8))]
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    for continuation in continuations:
        arguments = ("what is it?", continuation, images, 0, "task", "test")
        yield Instance("loglikelihood", arguments, 0, metadata)

def rank(*continuations):
    return [result.text for result in model.loglikelihood(list(requests(*continuations)))]

(greedy,) = model.generate_until(list(requests({"max_new_tokens": 8})))
encoded.clear(), limits.clear()
pairs = rank("water", "no", greedy)
noted = [encoded[:], limits[:]]
print("FOUND", json.dumps([pairs, noted, rank("water", "x y " * 3000, "no")]))
"""


def test_a_continuation_too_long_for_the_llm_is_ranked_last(harness, ask, settings):
    said = ask([str(harness("lmms-eval")), "-c", RANK, str(CFG_PATH), json.dumps(settings)])
    (line,) = [line for line in said.split("\n") if line.startswith("FOUND ")]
    pairs, (encoded, limits), with_long = json.loads(line.removeprefix("FOUND "))
    assert [is_greedy for _, is_greedy in pairs] == [False, False, True]
    assert encoded == [3] and len(limits) == 1 and limits[0] < 20
    assert with_long[1] == [math.inf, False]
    assert [loss for loss, _ in with_long[::2]] == pytest.approx([loss for loss, _ in pairs[:2]])
    assert "request 1 is not ranked: question, images and answer take" in said
