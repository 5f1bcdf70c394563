"""VQAv2 and OK-VQA: questions about COCO's images, each with the answers of ten annotators."""

from collections.abc import Callable, Mapping, Sequence
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
    """`eval_file_path`: the folder with the two official files of a split

    `v2_OpenEnded_mscoco_val2014_questions.json`  {"questions": [{"question_id", "image_id", "question"}]}
    `v2_mscoco_val2014_annotations.json`          {"annotations": [{"question_id", "answers": [{"answer"}, ..]}]}
    `img_path`: COCO's images, named COCO_val2014_000000000042.jpg or 000000000042.jpg.
    """

    Config = VQAConfig
    RULES = "accuracy of GT-Vision-Lab/VQA, vqaEval.py"
    # MiniGPT-4's scoring rule, used in addition to the official one
    RELEASE_RULE: Callable[[str, Sequence[str]], float] | None = None
    # VQAv2's and OK-VQA's files may be in one folder
    QUESTIONS = ("v2_OpenEnded*{split}*questions*.json", "*OpenEnded*{split}*questions*.json")

    def items(self) -> list[BenchmarkItem]:
        split, prompt = self.cfg.split, self.prompt()
        questions = self.find(*(pattern.format(split=split) for pattern in self.QUESTIONS))
        # The annotations are in the same folder, also if `eval_file_path` is the file of questions.
        name = f"mscoco*{split}*annotations*.json"
        prefix = "v2_" if questions.name.startswith("v2_") else ""
        annotations = self.find(f"{prefix}{name}", f"*{name}", path=str(questions.parent))
        references, groups = {}, {}
        for where, row in rows(read_json(annotations), "annotations", annotations):
            name = ident(row, "question_id", where)
            references[name] = human_answers(row, where)
            groups[name] = group_of(row, "answer_type", where)
        items = []
        for where, row in rows(read_json(questions), "questions", questions):
            name, number = ident(row, "question_id", where), ident(row, "image_id", where).zfill(12)
            if name not in references:
                raise ValueError(
                    f"{where}: question {name} has no entry in '{annotations}'; is it of another split?"
                )
            image = self.image(
                f"COCO_{split}_{number}.jpg", f"{number}.jpg", f"{split}/COCO_{split}_{number}.jpg"
            )
            question = prompt.ask(field(row, "question", str, where))
            items.append(BenchmarkItem(name, (image,), question, references[name], groups[name]))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        return vqa_scores(items, answers, self.RELEASE_RULE)


@registry.register_benchmark("okvqa")
class OKVQA(VQAv2):
    """As VQAv2, with OK-VQA's files: `OpenEnded_mscoco_val2014_questions.json`, `mscoco_val2014_annotations.json`.

    MiniGPT-v2's folder works too: `okvqa_test_split.json`, a list of questions, beside
    `mscoco_val2014_annotations_clean.json`.
    """

    RULES = f"{VQAv2.RULES}; accuracy_minigpt4: MiniGPT-4, eval_vqa.py"
    RELEASE_RULE = staticmethod(metrics.vqa_accuracy_minigpt4)
    QUESTIONS = (
        "okvqa_test_split.json",
        "OpenEnded*{split}*questions*.json",
        "*OpenEnded*{split}*questions*.json",
    )


def vqa_scores(
    items: Sequence[BenchmarkItem],
    answers: Mapping[str, str],
    release_rule: Callable[[str, Sequence[str]], float] | None = None,
) -> Scores:
    """Return VQA accuracy over all items and for each answer type; a reference is the list of human answers.

    With a `release_rule` there is also `accuracy_minigpt4`, the mean of that rule.
    """
    accuracy = {item.id: metrics.vqa_accuracy(answers[item.id], item.reference) for item in items}
    figures = {"accuracy": Metric(accuracy)}
    if release_rule:
        by_release = {item.id: release_rule(answers[item.id], item.reference) for item in items}
        figures["accuracy_minigpt4"] = Metric(by_release)
    return Scores(with_groups(figures, items), accuracy, num_empty(answers))


def human_answers(row: dict[str, Any], where: str) -> list[str]:
    """Return the annotators' answers of a row. Raises ValueError if there are none, as in a test split."""
    if not row.get("answers"):
        raise ValueError(
            f"{where}: 'answers' is missing or empty; a split without public answers cannot be scored here"
        )
    answers = field(row, "answers", list, where)
    return [field(answer, "answer", str, f"{where} answers") for answer in answers]
