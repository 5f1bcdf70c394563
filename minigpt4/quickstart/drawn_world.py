"""The drawn world as benchmarks: descriptions of images that no training shows, and questions about them.

eval_configs/embedded_eval.yaml imports this file, so that `evaluate.py --tasks drawn_world drawn_questions` knows them.
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
    split: str = "held_out"  # or left_out: with pairs of colour and shape that no training shows
    num_images: int = 200
    prompt: str = "describe"
    max_new_tokens: int = 64
    batch_size: int = 100


class Drawn(Benchmark):
    """The first `num_images` images of an evaluation split; nothing is read."""

    Config = DrawnConfig

    def scenes(self) -> Iterator[tuple[str, world.Scene, Image.Image]]:
        """Yield (id, scene, image). Raises ValueError for an unknown split and for no image."""
        split, count = self.cfg.split, self.cfg.num_images
        if split not in world.EVAL_SPLITS or count < 1:
            expected = f"split: one of {', '.join(world.EVAL_SPLITS)}; num_images: at least 1"
            raise ValueError(f"split '{split}', num_images {count}; expected {expected}")
        for index in range(count):
            scene, image = world.draw(split, index)[:2]
            yield f"{split}/{index}", scene, Image.fromarray(image)


@registry.register_benchmark("drawn_world")
class DrawnWorld(Drawn):
    """Descriptions. The reference is a right one: it is parsed as an answer is."""

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

        # by attribute and item, how many of the objects are right, and how many there are
        rows: dict[str, dict[str, list[int]]] = {}
        right = {}
        for item in items:
            marked = marks(parse(item.reference), answers[item.id])
            for attribute, values in marked.items():
                rows.setdefault(attribute, {})[item.id] = [sum(values), len(values)]
            right[item.id] = float(np.mean([np.mean(values) for values in marked.values()]))
        return Scores(
            {name: Metric(counts, _share) for name, counts in rows.items()},
            right,
            num_empty(answers),
        )


@registry.register_benchmark("drawn_questions")
class DrawnQuestions(Drawn):
    """One question about each image; the kinds take turns and have figures of their own."""

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
    """Return the share of right ones of rows [N, 2] of right and of all."""
    right, count = rows.sum(axis=0)
    return right / count
