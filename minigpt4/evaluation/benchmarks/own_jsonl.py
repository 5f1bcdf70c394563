"""Your own questions: a line each."""

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
    default_question: str = "Describe this image in detail."  # of a line without one


@registry.register_benchmark("own_jsonl")
class OwnJsonl(Benchmark):
    """`eval_file_path`: JSON lines

        {"image": path or "images": [paths], "question": text, "answer": text or "answers": [texts], "id", "group",
         "options": [texts]}
    where question, id (default: the number of the line), group (figures of its own) and options may be left out. With
    options the answer is not generated: it is the one of them that the model finds likeliest.
    `img_path`: the folder that the images' paths start from.
    """

    Config = OwnJsonlConfig
    RULES = (
        "exact_match: case and punctuation do not count; vqa_accuracy: VQAv2; caption: coco-caption"
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
            one_image = "images" not in row
            images = (
                [field(row, "image", str, where)]
                if one_image
                else field(row, "images", list, where)
            )
            if not all(isinstance(image, str) and image for image in images):
                raise ValueError(f"{where}: an image is no path; found {images}")
            answers = (
                field(row, "answers", list, where)
                if "answers" in row
                else [field(row, "answer", str, where)]
            )
            if not answers or not all(isinstance(answer, str) for answer in answers):
                raise ValueError(
                    f"{where}: 'answers' holds {answers}; expected texts, at least one"
                )
            asked = (
                field(row, "question", str, where)
                if "question" in row
                else self.cfg.default_question
            )
            group, paths = group_of(row, "group", where), tuple(map(self.image, images))
            items.append(
                BenchmarkItem(
                    name, paths, prompt.ask(asked), answers, group, _options(row, answers, where)
                )
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        if self.cfg.metric == "caption":
            scores = caption_scores({item.id: item.reference for item in items}, answers)
            return scores._replace(metrics={"score": scores.metrics["CIDEr-D"], **scores.metrics})
        one = metrics.vqa_accuracy if self.cfg.metric == "vqa_accuracy" else best_match
        right = {item.id: one(answers[item.id], item.reference) for item in items}
        return Scores(with_groups({"score": Metric(right)}, items), right, num_empty(answers))


def _options(row: dict, answers: list[str], where: str) -> list[str]:
    """Return the options of a row, [] for none. Raises ValueError for what no answer can be chosen from."""
    options = field(row, "options", list, where) if "options" in row else []
    texts = {option for option in options if isinstance(option, str) and option.strip()}
    if "options" in row and (len(texts) < 2 or len(texts) < len(options)):
        raise ValueError(
            f"{where}: 'options' holds {options}; expected two texts or more, all different"
        )
    if options and not any(best_match(option, answers) for option in options):
        raise ValueError(f"{where}: none of the answers {answers} is among the options {options}")
    return options


def best_match(answer: str, labels: Sequence[str]) -> float:
    """Return 1.0 if the answer is one of the labels (see `metrics.exact_match`), else 0.0."""
    return max(metrics.exact_match(answer, label) for label in labels)
