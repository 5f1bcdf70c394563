"""IconQA: questions about abstract diagrams; the answer is one of several choices, chosen by ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, ident, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores


@dataclass
class IconQAConfig(BenchmarkConfig):
    prompt: str = "minigpt_v2_vqa"


@registry.register_benchmark("iconvqa")  # its name in MiniGPT-v2's YAML file
@registry.register_benchmark("iconqa")
class IconQA(Benchmark):
    """`eval_file_path`: `choose_text_val.json` of MiniGPT-v2

        [{"image_id": "7", "question", "choices": ["circle", "square"], "answer": 1, the index of the correct choice}]
    `img_path`: the folder with <image_id>/image.png.
    """

    Config = IconQAConfig
    RULES = "MiniGPT-4, eval_vqa.py: the choice of least loss (key `ranking`) is the right one"

    def items(self) -> list[BenchmarkItem]:
        path = self.find("choose_text_*.json", "*iconqa*.json", "*iconvqa*.json")
        prompt = self.prompt()
        items = []
        for number, (where, row) in enumerate(rows(read_json(path), "", path)):
            image = self.image(f"{ident(row, 'image_id', where)}/image.png")
            choices, answer = field(row, "choices", list, where), field(row, "answer", int, where)
            are_texts = all(isinstance(choice, str) and choice.strip() for choice in choices)
            if len(choices) < 2 or not are_texts:
                raise ValueError(f"{where}: 'choices' holds {choices}; expected two texts or more")
            if not 0 <= answer < len(choices):
                raise ValueError(
                    f"{where}: 'answer' is {answer}; expected the place of a choice, 0 to {len(choices) - 1}"
                )
            question = prompt.ask(field(row, "question", str, where))
            items.append(
                BenchmarkItem(str(number), (image,), question, choices[answer], options=choices)
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        right = {item.id: float(answers[item.id] == item.reference) for item in items}
        known = {item.id: item.options for item in items}
        unparsable = sum(text not in known[name] for name, text in answers.items())
        return Scores({"accuracy": Metric(right)}, right, unparsable)
