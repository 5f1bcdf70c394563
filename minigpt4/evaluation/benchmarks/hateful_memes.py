"""Hateful Memes: is an image with text on it hateful?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, read_json_lines
from minigpt4.evaluation.benchmarks.scores import Metric, Scores

LABELS = {"no": 0, "yes": 1}


@dataclass
class HatefulMemesConfig(BenchmarkConfig):
    prompt: str = "minigpt_v2_hm"
    max_new_tokens: int = 10


@registry.register_benchmark("hm")
class HatefulMemes(Benchmark):
    """`eval_file_path`: `dev_seen.jsonl` or another split, lines {"img": "img/42953.png", "text", "label": 0 or 1}.

    `img_path`: the folder that holds `img/`.
    """

    Config = HatefulMemesConfig
    RULES = (
        "MiniGPT-4, eval_vqa.py: the answer is yes or no, blanks and case aside; all else is wrong"
    )

    def items(self) -> list[BenchmarkItem]:
        path, prompt = self.find("dev_seen.jsonl", "*.jsonl"), self.prompt()
        items = []
        for number, (where, row) in enumerate(read_json_lines(path)):
            label = field(row, "label", int, where)
            if label not in (0, 1):
                raise ValueError(f"{where}: 'label' is {label}; expected 0 or 1")
            image = self.image(field(row, "img", str, where))
            items.append(
                BenchmarkItem(
                    str(number), (image,), prompt.ask(field(row, "text", str, where)), label
                )
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        labels = {name: LABELS.get(text.strip().lower()) for name, text in answers.items()}
        right = {item.id: float(labels[item.id] == item.reference) for item in items}
        return Scores({"accuracy": Metric(right)}, right, list(labels.values()).count(None))
