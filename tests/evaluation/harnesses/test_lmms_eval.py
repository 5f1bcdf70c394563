"""The plugin in the real lmms-eval: found by its entry point, the answers are those of evaluate.py."""

import json

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
    """Return the folder of two tasks of lmms-eval: own_items, generated, and own_ranked."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "code.py").write_text(CODE.format(folder=str(items)))
    task = TASK.format(name="items", kind="generate_until", file=items / "items.jsonl")
    (folder / "items.yaml").write_text(task + GENERATED.format(tokens=MAX_NEW_TOKENS))
    task = TASK.format(name="ranked", kind="multiple_choice", file=items / "ranked.jsonl")
    (folder / "ranked.yaml").write_text(task + RANKED)
    return folder


@pytest.fixture(scope="module")
def lmms_eval(harness, ask, settings, tasks, tmp_path_factory):
    """Return a function: the samples of a task that lmms-eval logs, by the id of their document."""

    def samples(task, *options):
        output = tmp_path_factory.mktemp("lmms")
        model_args = ",".join(f"{key}={value}" for key, value in ({"cfg_path": CFG_PATH} | settings).items())
        command = [harness("lmms-eval"), "-m", "lmms_eval", "--model", "minigpt4", "--model_args", model_args]
        command += ["--tasks", task, "--include_path", tasks, "--batch_size", "4", "--device", "cpu", *options]
        ask([*map(str, command), "--log_samples", "--output_path", str(output)], HF_HOME=str(output / "home"))
        (path,) = output.rglob("*_samples_*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {str(line["doc_id"]): line for line in lines}

    return samples


@pytest.mark.parametrize("form", [(), ("--force_simple",)], ids=["chat", "simple"])
def test_answers_are_those_of_evaluate(lmms_eval, evaluated, form):
    expected = evaluated("items.jsonl")
    found = {name: line["filtered_resps"][0] for name, line in lmms_eval("own_items", *form).items()}
    assert found == expected and len(found) == 12 and len(set(found.values())) > 5


def test_candidates_are_ranked_as_by_evaluate(lmms_eval, evaluated):
    expected = evaluated("ranked.jsonl", ranking="mean")
    options = ["the old wall", "water", "no"]
    best = {}
    for name, line in lmms_eval("own_ranked", "--force_simple").items():
        losses = [float(resp[0]) for resp in line["filtered_resps"]]
        best[name] = options[losses.index(min(losses))]
        assert line["acc"] == float(best[name] == line["target"])
    assert best == expected and len(set(best.values())) > 1
