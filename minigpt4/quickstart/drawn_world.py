"""The benchmarks drawn_world and drawn_questions: descriptions of held-out drawn images, and questions about them.

eval_configs/embedded_eval.yaml imports this file, making them known to `evaluate.py --tasks drawn_world drawn_questions`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, num_empty, with_groups
from minigpt4.quickstart import world
from minigpt4.quickstart.language import describe
from minigpt4.quickstart.parser import parse
from minigpt4.quickstart.questions import Question, draw_question


@dataclass
class DrawnConfig(BenchmarkConfig):
    eval_file_path: str = ""  # nothing is read: the images are drawn
    img_path: str = ""
    split: str = "held_out"  # or left_out, with colour-shape pairs that training never shows
    num_images: int = 200
    prompt: str = "describe"
    max_new_tokens: int = 64
    batch_size: int = 100


class Drawn(Benchmark):
    """A benchmark on the first `num_images` images of an evaluation split, drawn rather than read."""

    Config = DrawnConfig

    def scenes(self) -> Iterator[tuple[str, world.Scene, Image.Image]]:
        """Yield (id, scene, image). Raises ValueError for an unknown split or fewer than one image."""
        split, count = self.cfg.split, self.cfg.num_images
        if split not in world.EVAL_SPLITS or count < 1:
            expected = f"split: one of {', '.join(world.EVAL_SPLITS)}; num_images: at least 1"
            raise ValueError(f"split '{split}', num_images {count}; expected {expected}")
        for index in range(count):
            scene, image = world.draw(split, index)[:2]
            yield f"{split}/{index}", scene, Image.fromarray(image)


@registry.register_benchmark("drawn_world")
class DrawnWorld(Drawn):
    """Descriptions, parsed into attributes. The reference is a right description, parsed in the same way."""

    RULES = (
        "shares of attributes that are right; an object that is not named is wrong in everything"
    )
    HEADLINE = "exact"
    ASKS = False

    def items(self) -> list[BenchmarkItem]:
        question, items = self.prompt().ask(), []
        for name, scene, image in self.scenes():
            items.append(
                BenchmarkItem(name, (image,), question, describe(scene, np.random.default_rng(0)))
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        from minigpt4.quickstart.evaluate import marks

        # {attribute: {item id: [number of objects that are right, number of objects]}}
        counts: dict[str, dict[str, list[int]]] = {}
        per_item = {}
        for item in items:
            marked = marks(parse(item.reference), answers[item.id])
            for attribute, values in marked.items():
                counts.setdefault(attribute, {})[item.id] = [sum(values), len(values)]
            per_item[item.id] = float(np.mean([np.mean(values) for values in marked.values()]))
        metrics = {name: Metric(of_items, _share) for name, of_items in counts.items()}
        return Scores(metrics, per_item, num_empty(answers))


@registry.register_benchmark("drawn_questions")
class DrawnQuestions(Drawn):
    """One question about each image. The kinds of questions alternate, and each has an accuracy of its own."""

    @dataclass
    class Config(DrawnConfig):
        prompt: str = "question"
        max_new_tokens: int = 16

    RULES = "the first word that could be an answer is the right one"

    def items(self) -> list[BenchmarkItem]:
        prompt, items = self.prompt(), []
        for index, (name, scene, image) in enumerate(self.scenes()):
            question = draw_question(scene, index)
            truth = {"kind": question.kind, "subject": question.subject, "answer": question.answer}
            items.append(
                BenchmarkItem(name, (image,), prompt.ask(question.text), truth, question.kind)
            )
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        right = {}
        for item in items:
            question = Question(**item.reference, sentence="")
            right[item.id] = float(question.is_answered_by(answers[item.id]))
        return Scores(with_groups({"accuracy": Metric(right)}, items), right, num_empty(answers))


def _share(rows: np.ndarray) -> float:
    """Return the accuracy over rows [N, 2] of (right, all)."""
    right, count = rows.sum(axis=0)
    return right / count
