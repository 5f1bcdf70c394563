"""CHAIR: which COCO objects does a description mention that are not in the image?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, ident, mapping, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, figure


@dataclass
class ChairConfig(BenchmarkConfig):
    prompt: str = "describe"
    max_new_tokens: int = 300
    split: str = "val2014"
    # path of LisaAnne/Hallucination's synonyms.txt, which published results use; by default our own table
    synonyms: str | None = None

    READ_PATHS = (*BenchmarkConfig.READ_PATHS, "synonyms")


@registry.register_benchmark("chair")
class Chair(Benchmark):
    """`eval_file_path`: COCO's folder `annotations`, with

    `instances_val2014.json`  {"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}],
                               "categories": [{"id", "name"}]}
    `captions_val2014.json`   {"annotations": [{"image_id", "caption"}]}
    `img_path`: the folder of the images. Published results often use 500 of them: `max_images: 500`.
    """

    Config = ChairConfig
    RULES = "LisaAnne/Hallucination, chair.py: lower is better, but for recall"
    HEADLINE = "CHAIRi"
    ASKS = False

    def items(self) -> list[BenchmarkItem]:
        path = self.find(f"*instances*{self.cfg.split}*.json")
        content = mapping(read_json(path), f"'{path}'")
        # the objects of each image, from its annotated segments
        names = {}
        for where, row in rows(content, "categories", path):
            names[ident(row, "id", where)] = field(row, "name", str, where)
        objects: dict[str, set[str]] = {}
        for where, row in rows(content, "annotations", path):
            category = ident(row, "category_id", where)
            if category not in names:
                raise ValueError(
                    f"{where}: there is no category {category} among the {len(names)} of the file"
                )
            objects.setdefault(ident(row, "image_id", where), set()).add(names[category])
        captions = self._captions(path.parent)

        items, question = [], self.prompt().ask()
        for where, row in rows(content, "images", path):
            name, file = ident(row, "id", where), field(row, "file_name", str, where)
            if name not in captions:
                raise ValueError(
                    f"{where}: image {name} has no caption in '{self.files[-1]}'; is it of another split?"
                )
            truth = {"objects": sorted(objects.get(name, ())), "captions": captions[name]}
            items.append(BenchmarkItem(name, (self.image(file),), question, truth))
        return items

    def _captions(self, folder: object) -> dict[str, list[str]]:
        """Return the reference captions by image id."""
        path = self.find(f"*captions*{self.cfg.split}*.json", path=str(folder))
        captions: dict[str, list[str]] = {}
        for where, row in rows(mapping(read_json(path), f"'{path}'"), "annotations", path):
            captions.setdefault(ident(row, "image_id", where), []).append(
                field(row, "caption", str, where)
            )
        return captions

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        objects = {item.id: item.reference["objects"] for item in items}
        captions = {item.id: item.reference["captions"] for item in items}
        table = metrics.read_synonyms(expand_path(self.cfg.synonyms)) if self.cfg.synonyms else None
        counts = metrics.chair_counts(answers, objects, captions, table)
        figures = {
            name: Metric(counts, figure(metrics.chair_of, name))
            for name in ("CHAIRi", "CHAIRs", "recall")
        }
        # An item's score is the fraction of correct mentions; an answer that mentions no object scores 1.
        correct, num_silent = {}, 0
        for item_id, count in counts.items():
            num_mentions, num_wrong = count[:2]
            correct[item_id] = 1.0 - num_wrong / max(num_mentions, 1)
            num_silent += int(num_mentions == 0)
        return Scores(figures, correct, num_silent)
