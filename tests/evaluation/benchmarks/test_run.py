"""From benchmarks to results: each item is asked once over calls and ranks, no answer is lost, results are complete."""

import json
import re
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
import torch.multiprocessing
from PIL import Image

from minigpt4.datasets.datasets.image_controls import GREY
from minigpt4.evaluation import run as run_module
from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem
from minigpt4.evaluation.benchmarks.own_jsonl import OwnJsonl
from minigpt4.evaluation.controls import shuffled, with_control
from minigpt4.evaluation.results import summary
from minigpt4.evaluation.run import Asked, OpenBenchmark, run_benchmarks
from tests.evaluation.benchmarks import official
from tests.evaluation.benchmarks.official import opened


def say(item):
    """Return an answer that depends only on the question and the image."""
    return f"Yes, {item.question.split()[3]} \u2028 {item.images[0].name if item.images else 'nothing'}"


def answer(items, cfg):
    for item in items:
        yield {"id": item.id, "answer": say(item)}


def run(root, output, answer=answer, name="pope", **more):
    return run_benchmarks({name: opened(name, root)}, output, answer, Asked(**more))[name]


def test_results_hold_what_is_needed_to_check_them(tmp_path, capsys):
    details = {
        "weights": {"checkpoint_3.pth": "ab" * 32},
        "config": {"model": {"arch": "mini_gpt4"}},
    }
    path = run(tmp_path, tmp_path / "out", details=details)
    content = json.loads(path.read_text())
    assert path == tmp_path / "out/pope/results.json" and content["headline"] == "f1"
    assert content["metrics"]["f1"]["value"] == pytest.approx(2 / 3)
    assert content["metrics"]["f1"]["low"] < 2 / 3 < content["metrics"]["f1"]["high"]
    assert content["counts"] == {"items": 12, "answered": 12, "errors": 0, "unparsable": 0}
    assert content["prompt"] == {"name": "yes_no/1", "text": "{question} Answer yes or no."}
    assert set(content["data"]) == {
        f"coco_pope_{split}.json" for split in ("random", "popular", "adversarial")
    }
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in content["data"].values())
    assert content["weights"] == details["weights"] and content["config"] == details["config"]
    assert set(content["versions"]) == {
        "python",
        "minigpt4",
        "torch",
        "transformers",
        "numpy",
        "pillow",
    }
    assert content["settings"]["max_new_tokens"] == 10 and content["asked_in_this_call"] == 12
    assert [record["id"] for record in content["items"]][:2] == ["adversarial/1", "adversarial/2"]
    assert content["items"][1]["score"] == 0 and content["items"][1]["reference"] == "no"
    said = capsys.readouterr().out
    assert "pope: 12 of 12 items answered, 0 unparsable" in said and re.search(
        r"^\* f1 +0\.6667   0\.\d{4} to", said, re.M
    )
    assert said.strip() == summary(path)


def test_without_a_readable_image_of_perception_mme_quotes_cognition(tmp_path):
    def half_blind(items, cfg):
        for item in items:
            is_readable = item.group == "code_reasoning"
            yield {"id": item.id, **({"answer": "yes"} if is_readable else {"error": "broken"})}

    content = json.loads(run(tmp_path, tmp_path / "out", half_blind, "mme").read_text())
    assert content["headline"] == "cognition" and content["counts"]["errors"] == 6
    assert content["metrics"]["cognition"]["value"] == 50


class Mistaken(OwnJsonl):
    """A benchmark of a user's own, with mistakes."""

    HEADLINE = "scores"

    def score(self, items, answers):
        scores = super().score(items, answers)
        if any(answers.values()):
            raise KeyError("colour")
        return scores


def test_a_headline_that_is_no_metric_is_refused_before_anything_is_asked(tmp_path):
    cfg = opened("own_jsonl", tmp_path).benchmark.cfg
    message = r"Mistaken\.HEADLINE is 'scores'; expected one of .*: score, hard/score"
    with pytest.raises(ValueError, match=message):
        Mistaken(cfg, "mistaken").checked_items()


@pytest.mark.parametrize("answered_before", [0, 1, 7, 12])
def test_an_interrupted_run_continues_and_gives_the_same_files(answered_before, tmp_path):
    expected = run(tmp_path, tmp_path / "whole").with_name("answers.jsonl").read_text()
    asked = []

    def interrupted(items, cfg):
        for number, line in enumerate(answer(items, cfg)):
            if number == answered_before:
                raise KeyboardInterrupt
            yield line
        raise KeyboardInterrupt

    def rest(items, cfg):
        asked.extend(item.id for item in items)
        return answer(items, cfg)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "out", interrupted)
    part = tmp_path / "out/pope/answers.part0.jsonl"
    with open(part, "a") as file:  # the kill came in the middle of a line
        file.write('{"id": "random/4", "answ')
    path = run(tmp_path, tmp_path / "out", rest)
    assert path.with_name("answers.jsonl").read_text() == expected and not part.exists()
    assert len(asked) == len(set(asked)) == 12 - answered_before


def test_answers_are_not_asked_again_but_errors_are(tmp_path):
    def half_blind(items, cfg):
        for item in items:
            is_bad = item.id == "random/1"
            yield (
                {"id": item.id, "error": "image: caf\udce9"}
                if is_bad
                else {"id": item.id, "answer": say(item)}
            )

    content = json.loads(run(tmp_path, tmp_path / "out", half_blind).read_text())
    assert content["counts"] == {"items": 12, "answered": 11, "errors": 1, "unparsable": 0}
    page = (tmp_path / "out/pope/results.html").read_text()
    assert "1 could not be read and are NOT in the figures" in page and "image: caf" in page
    # a file name that is not UTF-8
    assert [line["error"] for line in content["items"] if "error" in line] == ["image: caf\udce9"]
    asked = []

    def mended(items, cfg):
        asked.extend(items)
        return answer(items, cfg)

    for _ in range(2):
        content = json.loads(run(tmp_path, tmp_path / "out", mended).read_text())
    assert [item.id for item in asked] == ["random/1"] and content["counts"]["errors"] == 0
    assert content["asked_in_this_call"] == 0


@pytest.mark.parametrize(
    ("name", "first", "then", "says"),
    [
        ("pope", {"temperature": 0.5}, {"temperature": 0.9}, "temperature: 0.5 there, 0.9 now"),
        ("pope", {}, {"temperature": 0.9}, "temperature: 0.0 there, 0.9 now"),
        ("pope", {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}, "seed: 0 there, 1 now"),
        ("refcoco", {}, {"resample": 5}, "resample: 0 there, 5 now"),
    ],
)
def test_answers_sampled_in_another_way_are_not_mixed(tmp_path, name, first, then, says):
    def answered(**keys):
        return run_benchmarks({name: opened(name, tmp_path, **keys)}, tmp_path / "out", answer)

    answered(**first)
    with pytest.raises(ValueError, match=re.escape(says)):
        answered(**then)


def test_answers_of_other_settings_weights_or_data_are_not_mixed(tmp_path):
    path = run(tmp_path, tmp_path / "out", settings={"model.ckpt": "a.pth"})
    before = path.with_name("answers.jsonl").read_bytes()
    message = (
        "12 answers to something else (model.ckpt: 'a.pth' there, 'b.pth' now); give another name"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tmp_path, tmp_path / "out", settings={"model.ckpt": "b.pth"})
    other = {"pope": opened("pope", tmp_path, prompt="Say yes or no: {question}")}
    message = r"prompt: '{question} Answer yes or no\.' there, 'Say yes or no: {question}' now"
    with pytest.raises(ValueError, match=message):
        run_benchmarks(other, tmp_path / "out", answer)
    file = tmp_path / "coco/coco_pope_random.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match="data: "):
        run_benchmarks(
            {"pope": opened("pope", tmp_path, lambda root: {"eval_file_path": root / "coco"})},
            tmp_path / "out",
            answer,
        )
    assert path.with_name("answers.jsonl").read_bytes() == before


def test_answers_to_other_questions_or_about_other_images_are_not_mixed(tmp_path):
    def answered(**keys):
        own = opened("own_jsonl", tmp_path, **keys)
        run_benchmarks({"own": own}, tmp_path / "out", always_no)

    answered()
    answered(metric="vqa_accuracy", img_path=f"{tmp_path}/images/")  # the same questions
    with pytest.raises(ValueError, match=r"something else \(questions: '"):
        answered(default_question="What is this?")
    for name in ("a.jpg", "b.jpg"):
        official.draw(tmp_path / "other" / name)
    with pytest.raises(ValueError, match=r"img_path: '.*/images' there, '.*/other' now"):
        answered(img_path=str(tmp_path / "other"))


def test_answers_about_other_drawn_images_are_not_mixed(tmp_path):
    def answered(colour):
        own, items = opened("own_jsonl", tmp_path)
        drawn = [item._replace(images=[Image.new("RGB", (8, 8), colour)]) for item in items]
        run_benchmarks({"own": OpenBenchmark(own, drawn)}, tmp_path / "out", always_no)

    answered("red")
    answered("red")
    with pytest.raises(ValueError, match="questions: "):
        answered("blue")


def test_files_of_equal_names_are_told_apart(tmp_path):
    folder = official.mme(tmp_path)["eval_file_path"]
    for suffix in (".txt", ".png"):
        (folder / f"code_reasoning/1{suffix}").rename(folder / f"code_reasoning/0{suffix}")
    benchmark = opened("mme", tmp_path, lambda _: {"eval_file_path": folder})
    path = run_benchmarks({"mme": benchmark}, tmp_path / "out", always_no)["mme"]
    assert set(json.loads(path.read_text())["data"]) == {
        "artwork/questions_answers_YN/a.txt",
        "code_reasoning/0.txt",
        "existence/0.txt",
        "existence/1.txt",
    }
    question = folder / "existence/0.txt"
    question.write_text(question.read_text() + "\n")
    with pytest.raises(ValueError, match=r"data: "):
        run_benchmarks({"mme": benchmark}, tmp_path / "out", always_no)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"answer"', "answer", 1), "is no answer file"),
        (lambda text: text.replace('"id"', '"name"', 1), "is no answer file"),
        (lambda text: "7\n" + text, "is no answer file"),
        (lambda text: "notes", "is no answer file"),
        (
            lambda text: text + '{"id": "other", "answer": "x"}\n',
            "1 answers to what is no item now, first 'other'",
        ),
    ],
)
def test_a_damaged_answer_file_is_refused_and_kept(damage, message, tmp_path):
    path = run(tmp_path, tmp_path / "out").with_name("answers.jsonl")
    path.write_text(damage(path.read_text()))
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path / "out")
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda lines: lines[:-1], "1 items got no answer, first 'random/4'"),
        (lambda lines: [*lines, lines[0]], "'adversarial/1' was answered twice"),
        (lambda lines: [{"id": "x", "answer": ""}], "'x' was answered twice, or was not asked"),
    ],
)
def test_each_item_must_get_one_answer(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, tmp_path / "out", lambda items, cfg: wrong(list(answer(items, cfg))))


def thirteen(root):
    rows = [
        {"image": "a.jpg", "question": f"Is it number {n}?", "answer": "yes"} for n in range(13)
    ]
    official.write_lines(root / "questions.jsonl", rows)
    return {"eval_file_path": root / "questions.jsonl"}


def one_of_two_ranks(rank, root):
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    asked = []

    def noted(items, cfg):
        asked.extend(item.id for item in items)
        return answer(items, cfg)

    benchmark = {
        "own": opened("own_jsonl", root, lambda _: {"eval_file_path": root / "questions.jsonl"})
    }
    run_benchmarks(benchmark, root / "two", noted)
    try:
        run_benchmarks(benchmark, root / "two", noted, Asked(settings={"control": "b"}))
    except ValueError as error:
        said = [str(error)]
    own, items = benchmark["own"]
    try:
        run_benchmarks({"b": OpenBenchmark(Mistaken(own.cfg, "b"), items)}, root / "b", answer)
    except (KeyError, RuntimeError) as error:
        said.append(str(error))
    official.write_json(root / f"rank{rank}.json", [asked, *said])
    dist.destroy_process_group()


def test_two_ranks_answer_each_item_once_and_write_what_one_writes(tmp_path):
    official.draw(tmp_path / "images/a.jpg")
    benchmark = {"own": opened("own_jsonl", tmp_path, thirteen)}
    one = run_benchmarks(benchmark, tmp_path / "one", answer)["own"].with_name("answers.jsonl")
    torch.multiprocessing.start_processes(
        one_of_two_ranks, (tmp_path,), nprocs=2, start_method="fork"
    )
    rank_0, rank_1 = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in (0, 1))
    first, error, failure = rank_0
    second, other_error, other_failure = rank_1
    assert [len(first), len(second)] == [7, 6] and not set(first) & set(second)
    assert "answers to something else" in error and other_error == error
    assert failure == "'colour'" and other_failure == "rank 0 failed: KeyError: 'colour'"
    assert (tmp_path / "two/own/answers.jsonl").read_text() == one.read_text()


def one_fast_and_one_slow(rank, root, patience_s, seconds):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=5),
    )
    run_module.PATIENCE_S = patience_s

    def slow(items, cfg):
        for line in answer(items, cfg):
            time.sleep(seconds * rank)
            yield line

    benchmark = {
        "own": opened("own_jsonl", root, lambda _: {"eval_file_path": root / "questions.jsonl"})
    }
    try:
        run_benchmarks(benchmark, root / "out", slow)
    except (OSError, RuntimeError) as error:
        (root / f"error{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("patience_s", "seconds", "errors"),
    [(60, 1.1, []), (0.3, 0.8, ["own: the other ranks have answered nothing for 0.3 s"])],
)
def test_a_rank_waits_for_the_slowest_while_answers_come(patience_s, seconds, errors, tmp_path):
    official.draw(tmp_path / "images/a.jpg")
    own = {"own": opened("own_jsonl", tmp_path, thirteen)}
    run_benchmarks(own, tmp_path / "one", answer)  # imports what the ranks would wait for
    arguments = (tmp_path, patience_s, seconds)
    torch.multiprocessing.start_processes(
        one_fast_and_one_slow, arguments, nprocs=2, start_method="fork"
    )
    assert [path.read_text().split(";")[0] for path in tmp_path.glob("error0")] == errors
    assert (tmp_path / "out/own/results.json").exists() == (not errors)


def always_no(items, cfg):
    return ({"id": item.id, "answer": "no"} for item in items)


@pytest.mark.parametrize("control", ["blank", "shuffled"])
def test_controls_ask_the_same_questions_about_uninformative_images(control, tmp_path):
    items = opened("mme", tmp_path).items
    changed = with_control(items, control)
    assert [(a.id, a.question, a.reference) for a in items] == [
        (b.id, b.question, b.reference) for b in changed
    ]
    if control == "blank":
        for item, grey in zip(items, changed, strict=True):
            assert grey.images[0].size == Image.open(item.images[0]).size
            assert grey.images[0].getcolors() == [(1200, GREY)]
    else:
        pairs = {item.images: other.images for item, other in zip(items, changed, strict=True)}
        assert (
            all(a != b for a, b in pairs.items())
            and set(pairs) == set(pairs.values())
            and len(pairs) == 4
        )
        assert with_control(items, control) == changed
    path = run_benchmarks({"mme": opened("mme", tmp_path)}, tmp_path, always_no, Asked(control))
    assert path["mme"] == tmp_path / f"mme-{control}/results.json"
    assert json.loads(path["mme"].read_text())["control"] == control


def test_shuffled_items_keep_the_number_of_their_images_and_none_of_them(tmp_path):
    official.draw(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    names = ["a", "b", "c", "ab", "bc", "cd", "de", "abc", "def"]
    pairs = [tuple(name) for name in names]
    pairs += [(tmp_path / "a.png",), (tmp_path / "link.png",)]
    items = [BenchmarkItem(str(number), each, "q", "r") for number, each in enumerate(pairs)]
    for seed in range(20):
        for before, after in zip(items, shuffled(items, seed), strict=True):
            assert len(before.images) == len(after.images)
            assert not set(before.images) & set(after.images)
            assert {before.images, after.images} != {pairs[-1], pairs[-2]}  # one file
    with pytest.raises(ValueError, match=r"item '8' has 3 image\(s\), and no item has as many"):
        shuffled(items[8:])


def test_a_control_that_is_not_possible_is_refused(tmp_path):
    items = opened("mme", tmp_path).items
    with pytest.raises(ValueError, match="--control: unknown name 'blnk'; known: blank, shuffled"):
        with_control(items, "blnk")
    with pytest.raises(ValueError, match=r"has 1 image\(s\), and no item has as many others"):
        with_control(items[:2], "shuffled")
    with pytest.raises(ValueError, match="--control blank: the items have no images"):
        with_control([item._replace(images=()) for item in items], "blank")


def test_an_unreadable_image_is_an_error_under_a_control_too(tmp_path):
    (broken := tmp_path / "images/a.jpg").parent.mkdir()
    benchmark = opened("own_jsonl", tmp_path)
    broken.write_text("no image")
    blank = with_control(benchmark.items, "blank")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        blank[0].images  # noqa: B018
    assert blank[1].images[0].size == (40, 30)
