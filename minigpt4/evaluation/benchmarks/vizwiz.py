"""VizWiz-VQA: questions of blind people about their own photos; some cannot be answered from the image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, group_of, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Scores
from minigpt4.evaluation.benchmarks.vqa import human_answers, vqa_scores


@dataclass
class VizWizConfig(BenchmarkConfig):
    prompt: str = "short_answer_or_unanswerable"


@registry.register_benchmark("vizwiz")
class VizWiz(Benchmark):
    """`eval_file_path`: `val.json`, [{"image", "question", "answers": [{"answer"}, ..], "answer_type"}].

    `img_path`: the folder with VizWiz_val_00000000.jpg and the rest.
    """

    Config = VizWizConfig
    RULES = "accuracy of GT-Vision-Lab/VQA, vqaEval.py, as VizWiz's own; accuracy_minigpt4: MiniGPT-4, eval_vqa.py"

    def items(self) -> list[BenchmarkItem]:
        path, prompt = self.find("val.json", "*val*.json"), self.prompt()
        items, num_asked = [], Counter()
        for where, row in rows(read_json(path), "annotations", path):
            name = field(row, "image", str, where)
            question = prompt.ask(field(row, "question", str, where))
            num_asked[name] += 1  # the official file has one question per image
            item_id = name if num_asked[name] == 1 else f"{name}/{num_asked[name]}"
            group, reference = group_of(row, "answer_type", where), human_answers(row, where)
            items.append(BenchmarkItem(item_id, (self.image(name),), question, reference, group))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        return vqa_scores(items, answers, metrics.vizwiz_accuracy_minigpt4)
