"""VQAv2 and OK-VQA: questions about COCO's images, each answered by ten people."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, group_of, ident, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, num_empty, with_groups


@dataclass
class VQAConfig(BenchmarkConfig):
    split: str = "val2014"  # train2014 or val2014; the answers of test2015 are not public


@registry.register_benchmark("vqav2")
class VQAv2(Benchmark):
    """`eval_file_path`: the folder with the two official files of a split,

    `v2_OpenEnded_mscoco_val2014_questions.json`  {"questions": [{"question_id", "image_id", "question"}]}
    `v2_mscoco_val2014_annotations.json`          {"annotations": [{"question_id", "answers": [{"answer"}, ..]}]}
    `img_path`: COCO's images, named COCO_val2014_000000000042.jpg or 000000000042.jpg.
    """

    Config = VQAConfig
    RULES = "accuracy of GT-Vision-Lab/VQA, vqaEval.py"
    RELEASE_RULE: Callable[[str, Sequence[str]], float] | None = (
        None  # MiniGPT-4's, beside the official one
    )
    QUESTIONS = ("*OpenEnded*{split}*questions*.json",)

    def items(self) -> list[BenchmarkItem]:
        split, prompt = self.cfg.split, self.prompt()
        questions = self.find(*(pattern.format(split=split) for pattern in self.QUESTIONS))
        # beside the questions, if these were given by file
        annotations = self.find(f"*mscoco*{split}*annotations*.json", path=str(questions.parent))
        answered = {}
        for where, row in rows(read_json(annotations), "annotations", annotations):
            answered[ident(row, "question_id", where)] = (
                people(row, where),
                group_of(row, "answer_type", where),
            )
        items = []
        for where, row in rows(read_json(questions), "questions", questions):
            name, number = ident(row, "question_id", where), ident(row, "image_id", where).zfill(12)
            if name not in answered:
                raise ValueError(
                    f"{where}: question {name} has no entry in '{annotations}'; is it of another split?"
                )
            image = self.image(
                f"COCO_{split}_{number}.jpg", f"{number}.jpg", f"{split}/COCO_{split}_{number}.jpg"
            )
            question = prompt.ask(field(row, "question", str, where))
            items.append(BenchmarkItem(name, (image,), question, *answered[name]))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        return vqa_scores(items, answers, self.RELEASE_RULE)


@registry.register_benchmark("okvqa")
class OKVQA(VQAv2):
    """As VQAv2, with OK-VQA's files: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`.

    MiniGPT-v2's folder is taken too: `okvqa_test_split.json`, a list of questions, beside
    `mscoco_val2014_annotations_clean.json`.
    """

    RULES = f"{VQAv2.RULES}; accuracy_minigpt4: MiniGPT-4, eval_vqa.py"
    RELEASE_RULE = staticmethod(metrics.vqa_accuracy_minigpt4)
    QUESTIONS = ("okvqa_test_split.json", *VQAv2.QUESTIONS)


def vqa_scores(
    items: Sequence[BenchmarkItem],
    answers: Mapping[str, str],
    release_rule: Callable[[str, Sequence[str]], float] | None = None,
) -> Scores:
    """Return VQA accuracy over all items and for each type of answer; a reference is the list of people's answers.

    With a `release_rule`, accuracy by that rule stands beside it.
    """
    accuracy = {item.id: metrics.vqa_accuracy(answers[item.id], item.reference) for item in items}
    figures = {"accuracy": Metric(accuracy)}
    if release_rule:
        by_release = {item.id: release_rule(answers[item.id], item.reference) for item in items}
        figures["accuracy_minigpt4"] = Metric(by_release)
    return Scores(with_groups(figures, items), accuracy, num_empty(answers))


def people(row: dict[str, Any], where: str) -> list[str]:
    """Return the answers of a row's people. Raises ValueError where there are none, as in a test split."""
    if not row.get("answers"):
        raise ValueError(
            f"{where}: 'answers' is missing or empty; a split without public answers cannot be scored here"
        )
    return list(_answers(field(row, "answers", list, where), where))


def _answers(answers: list, where: str) -> Iterator[str]:
    for answer in answers:
        yield field(answer, "answer", str, f"{where} answers")
