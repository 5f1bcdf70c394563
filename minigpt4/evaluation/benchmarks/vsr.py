"""VSR: is a statement about spatial relations in the image true or false?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, group_of, read_json, read_json_lines, rows
from minigpt4.evaluation.benchmarks.scores import Scores, label_scores
from minigpt4.evaluation.metrics import exact_match

LABELS = ("false", "true")


@dataclass
class VSRConfig(BenchmarkConfig):
    prompt: str = "minigpt_v2_vsr"
    max_new_tokens: int = 10


@registry.register_benchmark("vsr")
class VSR(Benchmark):
    """`eval_file_path`: `test.jsonl` of cambridgeltl/vsr_zeroshot (nothing is downloaded), or the same as a JSON list

        {"image": "000000085637.jpg", "caption": "The cat is on the mat.", "label": 1, "relation"}
    `img_path`: the folder of the images. Each relation is also scored on its own.
    """

    Config = VSRConfig
    RULES = "exact match, case and punctuation aside; accuracy_minigpt4: eval_vqa.py's, where only case is"

    def items(self) -> list[BenchmarkItem]:
        path, prompt = self.find("test.jsonl", "*vsr*.json*"), self.prompt()
        found = (
            read_json_lines(path) if path.suffix == ".jsonl" else rows(read_json(path), "", path)
        )
        items = []
        for number, (where, row) in enumerate(found):
            label = field(row, "label", int, where)
            if label not in (0, 1):
                raise ValueError(f"{where}: 'label' is {label}; expected 0 or 1")
            image = self.image(field(row, "image", str, where))
            question = prompt.ask(field(row, "caption", str, where))
            relation = group_of(row, "relation", where)
            items.append(BenchmarkItem(str(number), (image,), question, LABELS[label], relation))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        unparsable = 0
        for text in answers.values():
            unparsable += not any(exact_match(text, label) for label in LABELS)
        return label_scores(items, answers, unparsable)
