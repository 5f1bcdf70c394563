"""The newest release's evaluation scripts on made-up files: questions, boxes, accuracies.

Where the release's own rule is not the official one, its figure is `accuracy_minigpt4`; of RefCOCO it is `accuracy`.
"""

import itertools
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.metrics.vqa import normalise_answer, normalise_punctuation
from minigpt4.evaluation.run import OpenBenchmark, make_benchmark, run_benchmarks
from tests.golden_v2 import needs, read
from tests.golden_v2.made_up_data import write_json

EVAL_REF = read("h_evaluation/eval_ref.json", {"runs": {}})
EVAL_VQA = read("h_evaluation/eval_vqa.json", {})
IOU = read("h_evaluation/iou.json", {"cases": []})
BOXES = read("h_evaluation/box_acceptance.json", {"cases": []})
VQA_METRIC = read("h_evaluation/vqa_metric.json", {"normalisation": [], "accuracy": []})
# others by default
PROMPTS = {"okvqa": "minigpt_v2_vqa", "gqa": "minigpt_v2_vqa", "vizwiz": "minigpt_v2_vizwiz"}
SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
}


def numbers_of(lines):
    """Return {what stands before it: number} of the accuracies that a script printed."""
    found = {}
    for line in lines:
        if match := re.search(r"([\w+]+ ?\w*)(?: Acc| Accuracy is)?: +([\d.]+)$", line):
            found[match[1].strip()] = float(match[2])
    return found


def draw(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 3)).save(folder / name)


# boxes


@pytest.mark.parametrize(("a", "b", "value"), IOU["cases"])
def test_intersection_over_union(a, b, value):
    if value is None:
        pytest.skip("the release divides by zero")
    assert metrics.box_iou(a, b, plus_one=True) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("case", BOXES["cases"], ids=lambda case: case["prediction"])
def test_boxes_that_are_accepted_and_counted(case):
    size = (BOXES["width"], BOXES["height"])
    assert metrics.starts_with_box(case["prediction"]) == case["accepted_by_pattern"]
    found = metrics.box_accuracy([case["prediction"]], [(0, 0, *size)], [size])
    assert bool(found["accuracy"]) == case["counted"]


# eval_ref


def canned(answers):
    """Return what answers items by a table of lists: the k-th time a phrase is asked, its k-th answer, or the last."""
    asked = dict.fromkeys(answers, 0)

    def answer(items, cfg):
        for item in items:
            (phrase,) = [phrase for phrase in answers if item.question.endswith(f" {phrase}")]
            asked[phrase] += 1
            yield {
                "id": item.id,
                "answer": answers[phrase][min(asked[phrase], len(answers[phrase])) - 1],
            }

    return answer, asked


def options_of(argv):
    """Return the data sets of a run's command line and our keys for it; eval_ref accepts all in its fifth round."""
    options = dict(itertools.pairwise(argv))
    keys = {"resolution": int(options["--res"])} if "--res" in options else {}
    keys |= {"resample": 5} if "--resample" in argv else {}
    return options.get("--dataset", "refcoco").split(","), keys


@pytest.mark.parametrize("name", EVAL_REF["runs"])
def test_eval_ref(name, tmp_path):
    run = EVAL_REF["runs"][name]
    names, keys = options_of(run["argv"])
    if run.get("raises") or not run["stdout"]:
        for each in names:
            with pytest.raises(KeyError, match=f"'{each}'"):
                registry.get_benchmark_class(each)
        return
    answer, _ = canned(EVAL_REF["canned_answers"])
    found, first = {}, None
    for each in names:
        for less, split in enumerate(SPLITS[each]):
            rows = EVAL_REF["rows"][: len(EVAL_REF["rows"]) - less]
            write_json(tmp_path / each / f"{each}_{split}.json", rows)
            draw(tmp_path, [row["img_id"][:27] + ".jpg" for row in rows])
            paths = {
                "eval_file_path": str(tmp_path / each / f"{each}_{split}.json"),
                "img_path": str(tmp_path),
            }
            benchmark = make_benchmark(each, {**paths, **keys})
            opened = OpenBenchmark(benchmark, benchmark.checked_items())
            first = first or opened.items[0].question
            (path,) = run_benchmarks(
                {each: opened}, tmp_path / f"out_{each}_{split}", answer
            ).values()
            found[f"{each} {split}"] = (
                100 * json.loads(path.read_text())["metrics"]["accuracy"]["value"]
            )
    assert found == {
        name: pytest.approx(value, abs=1e-9) for name, value in numbers_of(run["stdout"]).items()
    }
    assert run["first_call"]["texts"][0] == f"<s>[INST] <Img><ImageHere></Img> {first} [/INST]"


@needs("h_evaluation/eval_ref.json")
def test_only_what_begins_with_no_box_is_asked_again_and_in_its_own_words():
    benchmark = make_benchmark("refcoco", {"eval_file_path": "", "img_path": "", "resample": 5})
    answers = EVAL_REF["canned_answers"]
    items = [SimpleNamespace(id=phrase, question=f"where is {phrase}") for phrase in answers]
    answer, asked = canned(answers)
    said = {line["id"]: line["answer"] for line in benchmark.answers(items, answer)}
    for phrase, its in answers.items():
        good = next(
            (number for number, text in enumerate(its, 1) if metrics.starts_with_box(text)), 6
        )
        assert asked[phrase] == min(good, 6)
        assert said[phrase] == its[min(asked[phrase], len(its)) - 1]


# eval_vqa


def files_of(run, root):
    """Write the files of a run of eval_vqa; return our keys."""
    inputs = run.get("inputs") or EVAL_VQA[run["dataset"]]["inputs"]
    if run["dataset"] == "okvqa":
        write_json(root / "okvqa_test_split.json", inputs["split"])
        write_json(
            root / "mscoco_val2014_annotations_clean.json", {"annotations": inputs["annotations"]}
        )
        draw(root, [f"{row['image_id']:012d}.jpg" for row in inputs["split"]])
        return {"eval_file_path": str(root), "img_path": str(root)}
    images = [
        row.get("image") or row.get("img") or f"{row['image_id']}/image.png" for row in inputs
    ]
    draw(root, images)
    path = root / ("rows.jsonl" if run["dataset"] in ("hm", "vsr") else "rows.json")
    lines = "\n".join(map(json.dumps, inputs))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(inputs))
    return {"eval_file_path": str(path), "img_path": str(root)}


@pytest.mark.parametrize(
    "name", [name for name, run in EVAL_VQA.items() if run["calls"] and not run["canned_ranks"]]
)
def test_eval_vqa(name, tmp_path):
    run = EVAL_VQA[name]
    settings = files_of(run, tmp_path)
    if run["dataset"] in PROMPTS:
        settings["prompt"] = PROMPTS[run["dataset"]]
    benchmark = make_benchmark(run["dataset"], settings)
    items = benchmark.checked_items()
    texts = [text for call in run["calls"] for text in call["texts"]]
    assert [f"<s>[INST] <Img><ImageHere></Img> {item.question} [/INST]" for item in items] == texts
    answers = {}
    for item in items:
        (said,) = [said for words, said in run["canned"].items() if words in item.question]
        answers[item.id] = said[0]
    figures = benchmark.score(items, answers).metrics
    figure = figures.get("accuracy_minigpt4") or figures["accuracy"]
    (printed,) = numbers_of(run["stdout"]).values()
    # eval_vqa rounds OK-VQA's figure to two places
    tolerance = 0.005 if run["dataset"] == "okvqa" else 1e-9
    assert 100 * figure.value() == pytest.approx(printed, abs=tolerance)


@pytest.mark.parametrize("name", [name for name, run in EVAL_VQA.items() if run["canned_ranks"]])
def test_eval_vqa_by_ranking(name, tmp_path):
    run = EVAL_VQA[name]
    benchmark = make_benchmark(run["dataset"], files_of(run, tmp_path))
    items = benchmark.checked_items()
    texts = [text for call in run["calls"] for text in call["texts"]]
    assert [f"<s>[INST] <Img><ImageHere></Img> {item.question} [/INST]" for item in items] == texts
    # the script joins the choices by _, so that one with a _ in it is two
    split = ["_".join(item.options).split("_") for item in items]
    assert [len(choices) for choices in split] == [
        number for call in run["calls"] for number in call["num_cand"]
    ]
    best = [choices[ranks[0]] for choices, ranks in zip(split, run["canned_ranks"], strict=True)]
    figure = benchmark.score(
        items, dict(zip([item.id for item in items], best, strict=True))
    ).metrics["accuracy"]
    assert 100 * figure.value() == pytest.approx(*numbers_of(run["stdout"]).values())


# the metric of OK-VQA


@pytest.mark.parametrize("case", VQA_METRIC["normalisation"], ids=lambda case: repr(case["text"]))
def test_normalised_answers(case):
    assert normalise_punctuation(case["text"]) == case["punctuation"]
    assert normalise_answer(case["text"]) == case["both"]


@pytest.mark.parametrize("case", VQA_METRIC["accuracy"], ids=lambda case: repr(case["prediction"]))
def test_vqa_accuracy(case):
    """The script lowers the answer, the metric does not: "Skiing." is wrong either way where all say skiing."""
    accuracy = 100 * metrics.vqa_accuracy_minigpt4(case["prediction"], case["answers"])
    assert accuracy == pytest.approx(case["accuracy"], abs=0.005)
