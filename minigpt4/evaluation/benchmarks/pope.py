"""POPE: is there a .. in the image? Absent objects are random, popular, or often seen with those present (adversarial)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, ident, read_json_lines
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, figure, with_groups

FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass
class PopeConfig(BenchmarkConfig):
    prompt: str = "yes_no"
    max_new_tokens: int = 10


@registry.register_benchmark("pope")
class Pope(Benchmark):
    """`eval_file_path`: the folder with `coco_pope_random.json`, `_popular` and `_adversarial`, or one of them; each line

        {"question_id", "image": "COCO_val2014_000000310196.jpg", "text", "label": "yes" or "no"}
    `img_path`: the folder of COCO's val2014. Each split is also scored on its own; the overall metrics pool all answers.
    """

    Config = PopeConfig
    RULES = "AoiDragon/POPE, evaluate.py: an answer without no or not is yes; yes_ratio is that of the answers"
    HEADLINE = "f1"

    def items(self) -> list[BenchmarkItem]:
        prompt, items = self.prompt(), []
        for path in self.find_all("*_pope_*.json*"):
            split = path.stem.rpartition("_")[2]
            for where, row in read_json_lines(path):
                name, label = ident(row, "question_id", where), field(row, "label", str, where)
                if label not in ("yes", "no"):
                    raise ValueError(f"{where}: 'label' is '{label}'; expected yes or no")
                image = self.image(field(row, "image", str, where))
                question = prompt.ask(field(row, "text", str, where))
                items.append(BenchmarkItem(f"{split}/{name}", (image,), question, label, split))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        counts = metrics.pope_counts(answers, {item.id: item.reference for item in items})
        figures = {name: Metric(counts, figure(metrics.pope_of, name)) for name in FIGURES}
        # An answer is right if it is a "true yes" or a "true no" of POPE_COUNTS.
        right = {name: float(count[0] + count[2]) for name, count in counts.items()}
        unparsable = metrics.pope_of(sum(counts.values()))["unparsable"]
        return Scores(with_groups(figures, items), right, unparsable)
