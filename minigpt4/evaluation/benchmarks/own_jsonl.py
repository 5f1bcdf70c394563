"""Your own questions, one JSON line each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.captions import caption_scores
from minigpt4.evaluation.benchmarks.files import field, group_of, ident, read_json_lines
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, num_empty, with_groups

METRICS = ("exact_match", "vqa_accuracy", "caption")


@dataclass
class OwnJsonlConfig(BenchmarkConfig):
    prompt: str = "question"
    metric: str = "exact_match"  # exact_match: the answer is one of the answers; vqa_accuracy; caption: CIDEr-D
    default_question: str = "Describe this image in detail."  # for a line without a question


@registry.register_benchmark("own_jsonl")
class OwnJsonl(Benchmark):
    """`eval_file_path`: JSON lines

        {"image": path or "images": [paths], "question": text, "answer": text or "answers": [texts], "id", "group",
         "options": [texts]}
    where question, id (default: the line number), group (also scored on its own) and options are optional. With
    options the answer is not generated: it is the option that the model finds most likely.
    `img_path`: the folder that the images' paths are relative to.
    """

    Config = OwnJsonlConfig
    RULES = (
        "exact_match: case and punctuation do not count, except for options; vqa_accuracy: VQAv2; "
        "caption: coco-caption"
    )
    HEADLINE = "score"

    def items(self) -> list[BenchmarkItem]:
        if self.cfg.metric not in METRICS:
            raise ValueError(
                f"metric: unknown name '{self.cfg.metric}'; known: {', '.join(METRICS)}"
            )
        path, prompt = self.find("*.jsonl"), self.prompt()
        items = []
        for where, row in read_json_lines(path):
            name = ident(row, "id", where) if "id" in row else where.rpartition(" ")[2]
            images = _one_or_more(row, "image", "images", where)
            if not all(isinstance(image, str) and image for image in images):
                raise ValueError(f"{where}: an image is no path; found {images}")
            answers = _one_or_more(row, "answer", "answers", where)
            if not answers or not all(isinstance(answer, str) for answer in answers):
                raise ValueError(
                    f"{where}: 'answers' holds {answers}; expected texts, at least one"
                )
            question = self.cfg.default_question
            if "question" in row:
                question = field(row, "question", str, where)
            group, paths = group_of(row, "group", where), tuple(map(self.image, images))
            options = _options(row, answers, where)
            question = prompt.ask(question)
            items.append(BenchmarkItem(name, paths, question, answers, group, options))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        if self.cfg.metric == "caption":
            scores = caption_scores({item.id: item.reference for item in items}, answers)
            found = {"score": scores.metrics["CIDEr-D"], **scores.metrics}
            return scores._replace(metrics=with_groups(found, items))
        right = {item.id: self._score_one(item, answers[item.id]) for item in items}
        return Scores(with_groups({"score": Metric(right)}, items), right, num_empty(answers))

    def _score_one(self, item: BenchmarkItem, answer: str) -> float:
        if self.cfg.metric == "vqa_accuracy":
            return metrics.vqa_accuracy(answer, item.reference)
        # Options may differ in case or punctuation only: "C", "C++".
        if item.options:
            return float(answer in item.reference)
        return max(metrics.exact_match(answer, label) for label in item.reference)


def _one_or_more(row: dict, one: str, several: str, where: str) -> list:
    """Return the list row[several] if it is there, else [row[one]], where row[one] is a text."""
    if several in row:
        return field(row, several, list, where)
    return [field(row, one, str, where)]


def _options(row: dict, answers: list[str], where: str) -> list[str]:
    """Return the options of a row, [] if it has none. Raises ValueError unless they are different texts, one an answer."""
    options = field(row, "options", list, where) if "options" in row else []
    texts = {option for option in options if isinstance(option, str) and option.strip()}
    if "options" in row and (len(texts) < 2 or len(texts) < len(options)):
        raise ValueError(
            f"{where}: 'options' holds {options}; expected two texts or more, all different"
        )
    if options and not texts & set(answers):
        raise ValueError(f"{where}: none of the answers {answers} is among the options {options}")
    return options
