"""The interface of a benchmark: its section of the configuration, its items, and the scores of their answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4.common.config import REQUIRED
from minigpt4.common.utils import expand_path
from minigpt4.evaluation.benchmarks.files import find_file, find_files
from minigpt4.evaluation.benchmarks.scores import Scores
from minigpt4.evaluation.prompts import Prompt, find_prompt
from minigpt4.evaluation.ranking import check_rule

if TYPE_CHECKING:
    from PIL.Image import Image


class BenchmarkItem(NamedTuple):
    """One question. `id`, `images`, `question`, `options` are those of `items.Item`; `question` includes the prompt.

    `reference` is the ground truth in the form that the benchmark's `score` reads; it must be JSON-serialisable. Items
    of the same `group` (a split, a type of question) are also scored on their own.
    """

    id: str
    images: Sequence[str | Path | Image]
    question: str
    reference: Any
    group: str = ""
    options: Sequence[str] = ()


@dataclass
class BenchmarkConfig:
    """A section of `evaluation_datasets`. Subclasses set their own defaults."""

    eval_file_path: str = REQUIRED  # the official annotation file, or the folder of the files
    img_path: str = REQUIRED  # the folder of the images
    prompt: str = "short_answer"  # a name from prompts.txt, or your own text
    max_new_tokens: int = 20
    batch_size: int = 8
    temperature: float = 0.0  # 0: greedy; else answers are sampled, with `seed`
    seed: int = 0
    # for a quick look: at most so many images, evenly spaced, with all their questions
    max_images: int | None = None
    ranking: str = "release"  # for items with options, one of ranking.RULES
    benchmark: str | None = None  # registered name, if the section's own name differs

    READ_PATHS = ("eval_file_path", "img_path")


class Benchmark:
    """Base class. A subclass is registered and sets Config, RULES, HEADLINE, items and score."""

    Config: type[BenchmarkConfig] = BenchmarkConfig
    RULES = ""  # whose scoring rules the metrics follow; results.json quotes it
    HEADLINE = "accuracy"  # the metric that is usually quoted
    ASKS = True  # whether each item has a question of its own, for the prompt's {question} slot

    def __init__(self, cfg: BenchmarkConfig, name: str) -> None:
        self.cfg = cfg
        self.name = name  # as registered
        self.files: list[Path] = []  # the files that items() has read, images excluded

    def items(self) -> list[BenchmarkItem]:
        """Return all items. Raises ValueError or OSError for files that are not in the official format."""
        raise NotImplementedError

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        """Return the scores of the answers; `answers` has one for each item, by id."""
        raise NotImplementedError

    def answers(
        self, items: Sequence[BenchmarkItem], answer: Callable[..., Iterable[dict]]
    ) -> Iterable[dict]:
        """Return the lines of `answer(items, cfg)` (see run.Answer), one per item; a subclass may ask again."""
        return answer(items, self.cfg)

    def prompt(self) -> Prompt:
        """Return the prompt. Raises ValueError for an unknown one, and if its {question} slot does not fit `ASKS`."""
        return find_prompt(self.cfg.prompt, self.ASKS)

    def find(self, *patterns: str, path: str | None = None) -> Path:
        """Return the annotation file (see `find_file`) and record it in `files`."""
        self.files.append(find_file(path or self.cfg.eval_file_path, *patterns))
        return self.files[-1]

    def find_all(self, *patterns: str) -> list[Path]:
        """Return the annotation files (see `find_files`) and record them in `files`."""
        found = find_files(self.cfg.eval_file_path, *patterns)
        self.files += found
        return found

    def image(self, *names: str) -> Path:
        """Return the path of the first of the names that exists in `img_path`, of the first name if none does."""
        paths = [expand_path(self.cfg.img_path) / name for name in names]
        return next((path for path in paths if path.is_file()), paths[0])

    def checked_items(self) -> list[BenchmarkItem]:
        """Return `items()`, limited to `max_images` images.

        Raises ValueError or OSError as `items`, and for no items, duplicate ids, missing images, references that cannot
        be scored, and a HEADLINE that is not among the metrics.
        """
        check_rule(self.cfg.ranking)
        if not self.cfg.temperature >= 0:
            raise ValueError(f"temperature: {self.cfg.temperature}; expected 0 (greedy) or more")
        items = self.items()
        where = f"'{self.files[0]}'" if self.files else "the benchmark"
        if not items:
            raise ValueError(f"{where} has no item")
        item_id, count = Counter(item.id for item in items).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{where}: the id '{item_id}' is there {count} times; ids must differ")
        if self.cfg.max_images is not None:
            items = items_of_images(items, self.cfg.max_images)
        self._check_images(items)
        # Score empty answers, so that a bad reference is found now and not after hours of answering.
        try:
            scores = self.score(items, {item.id: "" for item in items})
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        if self.HEADLINE not in scores.metrics:
            raise ValueError(
                f"{type(self).__name__}.HEADLINE is '{self.HEADLINE}'; expected one of the metrics of its score(): "
                f"{', '.join(scores.metrics) or 'there are none'}"
            )
        return items

    def _check_images(self, items: Sequence[BenchmarkItem]) -> None:
        """Raise FileNotFoundError if an image file is missing."""
        images = chain.from_iterable(item.images for item in items)
        paths = dict.fromkeys(image for image in images if isinstance(image, (str, Path)))
        missing = [path for path in paths if not Path(path).is_file()]
        if missing:
            shown = ", ".join(f"'{path}'" for path in missing[:3])
            if len(missing) > 3:
                shown += ", .."
            raise FileNotFoundError(
                f"img_path: {len(missing)} of {len(paths)} images are not there: {shown}"
            )


def items_of_images(items: Sequence[BenchmarkItem], count: int) -> list[BenchmarkItem]:
    """Return the items of `count` images, evenly spaced over all images. Raises ValueError for less than one image."""
    if count < 1:
        raise ValueError(f"max_images: {count}; expected at least 1")
    images = list(dict.fromkeys(map(images_key, items)))
    step = max(1.0, len(images) / count)
    kept = {images[int(number * step)] for number in range(min(count, len(images)))}
    return [item for item in items if images_key(item) in kept]


def images_key(item: BenchmarkItem) -> tuple:
    """Return a key that is equal for items about the same images: their paths, or the identity of PIL images."""
    return tuple(
        str(image) if isinstance(image, (str, Path)) else id(image) for image in item.images
    )
