"""Each benchmark reads its official files and scores by the official rules."""

import shutil

import pytest

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.mme import SUBTASKS
from minigpt4.evaluation.results import intervals
from tests.evaluation.benchmarks import official
from tests.evaluation.benchmarks.official import opened


def figures(benchmark, items, answers):
    """Return {metric: value} for answers in the order of the items, or for one answer to all items."""
    answers = [answers] * len(items) if isinstance(answers, str) else answers
    scores = benchmark.score(
        items, {item.id: text for item, text in zip(items, answers, strict=True)}
    )
    assert (
        set(scores.per_item) == {item.id for item in items} and benchmark.HEADLINE in scores.metrics
    )
    return {name: metric.value() for name, metric in scores.metrics.items()}, scores


def test_every_registered_name_has_a_class_with_rules_and_a_headline():
    names = registry.list_benchmarks()
    assert set(names) >= {writer.__name__ for writer in official.WRITERS} | {
        "refcoco+",
        "refcocog",
        "nocaps",
        "flickr30k",
        "iconvqa",
    }
    for name in names:
        assert (
            registry.get_benchmark_class(name).RULES and registry.get_benchmark_class(name).HEADLINE
        )


def test_coco_captions(tmp_path):
    benchmark, items = opened("coco_caption", tmp_path)
    assert [(item.id, item.reference) for item in items[:2]] == [
        ("7", ["A red bus.", "A bus in the street."]),
        ("8", ["Two dogs run."]),
    ]
    assert items[0].images == (tmp_path / "images/COCO_val2014_000000000007.jpg",)
    assert {item.question for item in items} == {"Describe this image in one short sentence."}
    said = ["A bus in the street.", "Two dogs run.", ""]
    found, scores = figures(benchmark, items, said)
    references = {item.id: item.reference for item in items}
    answers = dict(zip(references, said, strict=True))
    assert found["CIDEr-D"] == pytest.approx(
        metrics.cider_d(references, answers, metrics.caption_words)[0]
    )
    assert found["BLEU-4"] == pytest.approx(
        metrics.bleu(references, answers, metrics.caption_words)[3]
    )
    assert scores.unparsable == 1 and scores.per_item["9"] == 0


def test_karpathys_split(tmp_path):
    _, items = opened("coco_caption", tmp_path, official.karpathy)
    assert [item.id for item in items] == ["1.jpg", "2.jpg"]
    assert items[0].images == (tmp_path / "images/val2014/1.jpg",)
    with pytest.raises(ValueError, match="split: 'val' is not in the file; there are test, train"):
        opened("coco_caption", tmp_path, official.karpathy, split="val")


@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_vqa_takes_the_questions_of_its_split(name, tmp_path):
    benchmark, items = opened(name, tmp_path)
    assert [item.id for item in items] == ["420", "421", "422"] and items[
        0
    ].reference == official.TEN
    assert items[0].images == (tmp_path / "images/COCO_val2014_000000000042.jpg",)
    # four wrote cat, three kitten; "a cat" is a different answer, as human answers keep their articles
    found, scores = figures(benchmark, items, ["Cat", "a kitten!", ""])
    by_release = {key: found.pop(key) for key in list(found) if "minigpt4" in key}
    # The release drops the articles of human answers too: seven wrote cat.
    assert by_release.get("accuracy_minigpt4") == (
        pytest.approx(1.9 / 3) if name == "okvqa" else None
    )
    assert found == {
        "accuracy": pytest.approx((1.0 + 0.9 + 0) / 3),
        "other/accuracy": pytest.approx(0.5),
        "number/accuracy": pytest.approx(0.9),
    }
    assert scores.unparsable == 1


def test_vqav2_and_okvqa_may_be_in_one_folder(tmp_path):
    both = official.vqav2(tmp_path) | official.okvqa(tmp_path)
    folder = both["eval_file_path"]
    official.write_json(folder / "okvqa_test_split.json", official.vqa_rows(tmp_path)[0])
    vqav2 = ["v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"]
    okvqa = ["okvqa_test_split.json", "mscoco_val2014_annotations.json"]

    def files_of(name, path):
        benchmark = opened(name, tmp_path, lambda _: {"eval_file_path": path}).benchmark
        return [file.name for file in benchmark.files]

    assert files_of("vqav2", folder) == files_of("vqav2", folder / vqav2[0]) == vqav2
    assert files_of("okvqa", folder) == files_of("okvqa", folder / okvqa[0]) == okvqa
    (folder / okvqa[0]).unlink()
    assert files_of("okvqa", folder) == ["OpenEnded_mscoco_val2014_questions.json", okvqa[1]]


def test_minigpt_v2s_folder_of_okvqa(tmp_path):
    questions, annotations = official.vqa_rows(tmp_path)
    official.write_json(tmp_path / "o/okvqa_test_split.json", questions)
    official.write_json(
        tmp_path / "o/mscoco_val2014_annotations_clean.json", {"annotations": annotations}
    )
    official.write_json(
        tmp_path / "o/OpenEnded_mscoco_val2014_questions_clean.json", {"questions": questions}
    )
    _, items = opened(
        "okvqa", tmp_path, lambda root: {"eval_file_path": root / "o"}, prompt="minigpt_v2_vqa"
    )
    tag = "[vqa] Based on the image, respond to this question with a short answer: "
    assert [item.question for item in items] == [f"{tag}What is number {n}?" for n in range(3)]


def test_vizwiz(tmp_path):
    benchmark, items = opened("vizwiz", tmp_path)
    assert [item.id for item in items] == ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    assert items[0].question.startswith("What is this?") and items[0].question.endswith(
        "unanswerable"
    )
    expected = {"accuracy": 0.5, "accuracy_minigpt4": 0.5}
    assert figures(benchmark, items, ["cat", "unanswerable"])[0] == expected


def test_gqa_in_both_file_formats(tmp_path):
    benchmark, items = opened("gqa", tmp_path)
    assert [(item.id, item.group, item.images[0].name) for item in items] == [
        ("20000", "verify", "n0.jpg"),
        ("20001", "query", "n1.jpg"),
    ]
    found, _ = figures(benchmark, items, ["Yes.", "woman"])
    official_rule = {key: value for key, value in found.items() if "minigpt4" not in key}
    assert official_rule == {"accuracy": 0.5, "verify/accuracy": 1.0, "query/accuracy": 0.0}
    assert (
        found["accuracy_minigpt4"] == 0
        and figures(benchmark, items, ["Yes", "man"])[0]["accuracy_minigpt4"] == 1
    )
    rows = [{"image": "n0.jpg", "question": "Is it red?", "answer": "yes"}]
    official.write_json(tmp_path / "gqa.json", rows)
    _, items = opened("gqa", tmp_path, lambda root: {"eval_file_path": root / "gqa.json"})
    assert [(item.id, item.reference) for item in items] == [("0", "yes")]


def test_pope_always_yes_and_its_splits(tmp_path):
    benchmark, items = opened("pope", tmp_path)
    assert len(items) == 12 and items[0].id == "adversarial/1"
    assert items[0].question == "Is there a dog in the image? Answer yes or no."
    found, scores = figures(benchmark, items, "Yes, there is.")
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert {name: found[f"random/{name}"] for name in expected} == pytest.approx(
        expected
    ) and scores.unparsable == 0
    found, scores = figures(benchmark, items, ["Yes.", "No."] * 6)
    assert found["popular/f1"] == found["f1"] == 1 and found["yes_ratio"] == 0.5
    assert figures(benchmark, items, "a dog")[1].unparsable == 12


def test_chair_of_the_worked_example(tmp_path):
    benchmark, items = opened("chair", tmp_path)
    assert items[2].reference == {"objects": ["car"], "captions": ["There is something."]}
    said = [
        "A dog and a person with a frisbee.",
        "A cat.",
        "A car and a car behind a truck.",
        "Nothing to see.",
    ]
    found, scores = figures(benchmark, items, said)
    assert found == pytest.approx({"CHAIRs": 0.5, "CHAIRi": 2 / 7, "recall": 1.0})
    assert (
        scores.per_item == pytest.approx({"0": 2 / 3, "1": 1, "2": 2 / 3, "3": 1})
        and scores.unparsable == 1
    )


def test_mme_agrees_with_the_metric(tmp_path):
    benchmark, items = opened("mme", tmp_path)
    assert [item.id for item in items][:2] == ["existence/0/1", "existence/0/2"] and len(items) == 8
    assert items[0].question == "Is there a boat in this image? Please answer yes or no."
    assert "artwork/a/1" in {item.id for item in items} and items[-1].images[0].name == "1.png"
    # one image with both answers right, one with one; "Maybe" is neither yes nor no
    said = ["Yes", "No", "Yes", "Yes", "Maybe", "no", "yes", "yes"]
    found, scores = figures(benchmark, items, said)
    questions = {
        i.id: metrics.MMEQuestion(i.group, i.id.rpartition("/")[0], i.reference) for i in items
    }
    theirs = metrics.mme(dict(zip(questions, said, strict=True)), questions)
    subtasks = {name: value["score"] for name, value in theirs["subtasks"].items()}
    assert found == pytest.approx(
        {name: theirs[name] for name in ("perception", "cognition")} | subtasks
    )
    assert (
        found["existence"] == pytest.approx(75 + 50)
        and scores.unparsable == theirs["unparsable"] == 1
    )
    assert len(SUBTASKS) == 14


def test_mme_without_a_subtask_of_perception_quotes_cognition(tmp_path):
    def cognition(root):
        section = official.mme(root)
        for subtask in ("existence", "artwork"):
            shutil.rmtree(section["eval_file_path"] / subtask)
        return section

    benchmark, items = opened("mme", tmp_path, cognition)
    found, _ = figures(benchmark, items, ["Yes", "No"])
    assert benchmark.HEADLINE == "cognition" and found == {"cognition": 200, "code_reasoning": 200}


def test_mme_resamples_the_images_of_each_subtask(tmp_path):
    benchmark, items = opened("mme", tmp_path)
    scores = benchmark.score(items, {item.id: item.reference for item in items})
    perfect = {"value": 400, "low": 400, "high": 400}  # existence and artwork
    assert intervals(scores)["perception"] == perfect


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco_finds_its_own_splits_as_shipped(name, tmp_path):
    for other in ("refcoco", "refcoco+", "refcocog"):  # all eight files in one folder
        section = official.refcoco(tmp_path, other)
    benchmark, items = opened(name, tmp_path, lambda root: section)
    assert [item.id for item in items] == [
        f"{split}/{n}" for split in ("testA", "val") for n in range(3)
    ]
    assert items[0].images == (tmp_path / "images/COCO_train2014_000000580950.jpg",)
    assert items[0].question == "[refer] give me the location of the red cup"
    said = [
        "{<10><10><30><30>}",
        "{<10><10><19><30>}",
        "a tree",
        "{<10><10><30><30>}",
        "{<10> <10><30><30>}",
        "{<1>}",
    ]
    found, scores = figures(benchmark, items, said)
    hits = {key: value for key, value in found.items() if key.endswith("accuracy")}
    assert hits == pytest.approx({"accuracy": 0.5, "testA/accuracy": 1 / 3, "val/accuracy": 2 / 3})
    assert scores.unparsable == 2
    # half of the box, which is (64, 48, 128, 96) in pixels
    found, _ = figures(benchmark, items, "{<10><10><20><30>}")
    assert (found["accuracy"], found["accuracy_common"]) == (1, 1)
    assert found["mean_iou"] == pytest.approx(65 / 129)


def test_true_or_false_statements(tmp_path):
    benchmark, items = opened("vsr", tmp_path)
    assert [item.reference for item in items] == ["true", "false"] and items[1].group == "under"
    assert (
        items[0].question
        == "[vqa] Based on the image, is this statement true or false? The cat is on the mat."
    )
    found, scores = figures(benchmark, items, ["True.", "I do not know"])
    assert (
        found["accuracy"] == 0.5 and found["accuracy_minigpt4"] == 0 and found["on/accuracy"] == 1
    )
    assert scores.unparsable == 1
    # what can be right is not unparsable
    found, scores = figures(benchmark, items, [" true!", "it is false"])
    assert found["accuracy"] == 0.5 and scores.unparsable == 1


def test_choices_of_iconqa(tmp_path):
    benchmark, items = opened("iconqa", tmp_path)
    assert [(item.reference, item.options) for item in items] == [
        ("square", ["circle", "square"]),
        ("a_b", ["a_b", "2", "3"]),
    ]
    assert items[0].question.startswith("[vqa] ") and items[1].images == (
        tmp_path / "images/8/image.png",
    )
    found, scores = figures(benchmark, items, ["square", "2"])
    assert found == {"accuracy": 0.5} and scores.unparsable == 0


def test_hateful_memes(tmp_path):
    benchmark, items = opened("hm", tmp_path)
    assert [item.reference for item in items] == [0, 1]
    assert "'go away'. Is this image hateful?" in items[1].question
    found, scores = figures(benchmark, items, ["No", "maybe"])
    assert found == {"accuracy": 0.5} and scores.unparsable == 1


def test_refcoco_in_minigpt_v2s_folders(tmp_path):
    section = official.refcoco(tmp_path / "refcoco")
    section["eval_file_path"] = tmp_path
    (tmp_path / "refcoco/images").rename(tmp_path / "images")
    assert len(opened("refcoco", tmp_path, lambda root: section).items) == 6


def test_own_jsonl(tmp_path):
    benchmark, items = opened("own_jsonl", tmp_path)
    assert [item.id for item in items] == ["first", "2", "3"]
    assert [item.question for item in items] == [
        "What colour?",
        "Describe this image in detail.",
        "Which is red?",
    ]
    assert [len(item.images) for item in items] == [1, 1, 2]
    found, _ = figures(benchmark, items, ["Red!", "green", "the second"])
    assert found == pytest.approx({"score": 2 / 3, "hard/score": 1.0})
    benchmark, items = opened("own_jsonl", tmp_path, metric="caption")
    found, _ = figures(benchmark, items, "red")
    assert found["score"] == found["CIDEr-D"] and "BLEU-4" in found
    found, _ = figures(benchmark, items, ["red", "green", "red"])
    assert found["BLEU-1"] < 0.5 and found["hard/BLEU-1"] == pytest.approx(1)
    assert found["hard/score"] == found["hard/CIDEr-D"]


def test_options_of_own_jsonl_are_compared_as_they_are(tmp_path):
    benchmark, items = opened("own_jsonl", tmp_path, official.signs)
    assert figures(benchmark, items, ["+", "C++"])[0] == {"score": 1}
    assert figures(benchmark, items, ["-", "C"])[0] == {"score": 0}


def test_max_images_takes_evenly_spaced_images_with_all_their_questions(tmp_path):
    items = opened("pope", tmp_path, max_images=1).items
    assert len(items) == 6 and len({item.images for item in items}) == 1
    assert len(opened("mme", tmp_path, max_images=99).items) == 8
    with pytest.raises(ValueError, match="max_images: 0; expected at least 1"):
        opened("pope", tmp_path, max_images=0)
