"""MME: 14 subtasks with two questions about each image, the answer to one being yes, to the other no."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from minigpt4.common.image_files import IMAGE_SUFFIXES
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import read_text
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, figure
from minigpt4.evaluation.metrics.yes_no import (
    COGNITION,
    PERCEPTION,
    SUBTASKS,
    MMEQuestion,
    mme_answer,
)


@dataclass
class MMEConfig(BenchmarkConfig):
    img_path: str = ""  # not used: the images are beside the questions
    prompt: str = "question"  # MME's questions end in "Please answer yes or no."
    max_new_tokens: int = 10


@registry.register_benchmark("mme")
class MME(Benchmark):
    """`eval_file_path`: the folder `MME_Benchmark_release_version`, with one folder for each subtask.

    A subtask has images and text files of the same names with two lines, "question<tab>Yes" and "question<tab>No":
    side by side, or in folders `images` and `questions_answers_YN`. Without a subtask of perception the headline metric
    is cognition.
    """

    Config = MMEConfig
    RULES = "MME, answers read as by lmms-eval's task mme; accuracy + accuracy of whole images, times 100, a subtask"
    HEADLINE = "perception"

    def items(self) -> list[BenchmarkItem]:
        root, items = expand_path(self.cfg.eval_file_path), []
        for subtask in SUBTASKS:
            questions = images = root / subtask
            if (root / subtask / "questions_answers_YN").is_dir():
                questions = root / subtask / "questions_answers_YN"
                images = root / subtask / "images"
            texts = sorted(questions.glob("*.txt"))
            self.files += texts
            for path in texts:
                items += self._items_of(path, subtask, images)
        if not items:
            found = "none of its folders has questions" if root.is_dir() else "found nothing"
            raise FileNotFoundError(
                f"eval_file_path: no subtask in '{root}' ({found}); MME has {', '.join(SUBTASKS)}"
            )
        if not any(item.group in PERCEPTION for item in items):
            self.HEADLINE = "cognition"
        return items

    def _items_of(self, path: Path, subtask: str, images: Path) -> list[BenchmarkItem]:
        """Return the two items of a text file. Raises ValueError for another form."""
        lines = [line for line in read_text(path).splitlines() if line.strip()]
        if len(lines) != 2:
            raise ValueError(
                f"'{path}' has {len(lines)} lines; expected two, each a question, a tab, and Yes or No"
            )
        paths = [images / (path.stem + suffix) for suffix in IMAGE_SUFFIXES]
        image = next((file for file in paths if file.is_file()), paths[0])
        items = []
        for number, line in enumerate(lines, start=1):
            question, label = line.strip().rpartition("\t")[::2]
            if label not in ("Yes", "No"):
                raise ValueError(
                    f"'{path}' line {number}: expected a question, a tab, and Yes or No"
                )
            name = f"{subtask}/{path.stem}/{number}"
            question = self.prompt().ask(question.strip())
            items.append(BenchmarkItem(name, (image,), question, label.lower(), subtask))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        questions = {
            item.id: MMEQuestion(item.group, item.id.rpartition("/")[0], item.reference)
            for item in items
        }
        # Perception, cognition and each subtask are scored from their images; those without images are left out.
        counts = metrics.mme_counts(answers, questions)
        subtasks_of = {"perception": PERCEPTION, "cognition": COGNITION}
        subtasks_of |= {name: [name] for name in SUBTASKS}
        figures = {}
        for name, subtasks in subtasks_of.items():
            rows = {key: count for key, count in counts.items() if key[0] in subtasks}
            if rows:
                # A resample without an image of some subtask would lose its up to 200 points.
                figures[name] = Metric(rows, figure(_scores, name), stratum=itemgetter(0))
        parsed = {name: mme_answer(text) for name, text in answers.items()}
        right = {item.id: float(parsed[item.id] == item.reference) for item in items}
        return Scores(figures, right, list(parsed.values()).count("other"))


def _scores(counts: np.ndarray) -> dict[str, float]:
    """Return the scores of `metrics.mme_of` by name, 0 for a subtask without images."""
    found = metrics.mme_of(counts)
    scores = dict.fromkeys(SUBTASKS, 0.0)
    for name, values in found["subtasks"].items():
        scores[name] = values["score"]
    return scores | {"perception": found["perception"], "cognition": found["cognition"]}
