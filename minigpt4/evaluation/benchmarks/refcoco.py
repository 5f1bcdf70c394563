"""RefCOCO, RefCOCO+ and RefCOCOg: locate the object that a phrase refers to. The answer is a box."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, with_groups

COCO_NAME = 27  # length of COCO_train2014_000000580957, before the object's number, _0


@dataclass
class RefCOCOConfig(BenchmarkConfig):
    prompt: str = "minigpt_v2_refer"
    resolution: int = 100  # the coordinates in an answer are 0..resolution
    # how often an item is asked again, sampling at temperature 1, while its answer does not start with a box
    resample: int = 0


@registry.register_benchmark("refcoco")
@registry.register_benchmark("refcoco+")
@registry.register_benchmark("refcocog")
class RefCOCO(Benchmark):
    """`eval_file_path`: a file `refcoco_val.json`, or the folder with those of all splits, or that folder's parent

        [{"img_id": "COCO_train2014_000000580957_0", "sents", "bbox": [x, y, width, height], "height", "width"}]
    `img_path`: the folder of COCO's train2014. Each split is also scored on its own.
    """

    Config = RefCOCOConfig
    RULES = "MiniGPT-4, eval_ref.py: IoU of inclusive pixels > 0.5; accuracy_common: IoU >= 0.5; no box is wrong"

    def items(self) -> list[BenchmarkItem]:
        if self.cfg.resample < 0:
            raise ValueError(f"resample: {self.cfg.resample}; expected 0 or more")
        prompt, items = self.prompt(), []
        for path in self.find_all(f"{self.name}_*.json", f"{self.name}/{self.name}_*.json"):
            split = path.stem.rpartition("_")[2]
            for number, (where, row) in enumerate(rows(read_json(path), "", path)):
                image = self.image(field(row, "img_id", str, where)[:COCO_NAME] + ".jpg")
                size = [field(row, key, int, where) for key in ("width", "height")]
                reference = {"box": field(row, "bbox", list, where), "size": size}
                question = prompt.ask(field(row, "sents", str, where))
                name = f"{split}/{number}"
                items.append(BenchmarkItem(name, (image,), question, reference, split))
        return items

    def answers(
        self, items: Sequence[BenchmarkItem], answer: Callable[..., Iterable[dict]]
    ) -> Iterator[dict]:
        """Yield the lines of `answer`; ask again, at most `resample` times, if an answer does not start with a box."""
        asked = {item.id: item for item in items}
        for attempt in range(self.cfg.resample + 1):
            # The first attempt is made as configured, the others by sampling.
            cfg = replace(self.cfg, temperature=1.0, seed=attempt) if attempt else self.cfg
            is_last = attempt == self.cfg.resample
            again = {}
            for line in answer(list(asked.values()), cfg):
                is_settled = "answer" not in line or metrics.starts_with_box(line["answer"])
                if is_settled or is_last:
                    yield line
                else:
                    again[line["id"]] = asked[line["id"]]
            asked = again
            if not asked:
                return

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        boxes = {item.id: item.reference["box"] for item in items}
        sizes = {item.id: item.reference["size"] for item in items}
        found = metrics.box_accuracy(answers, boxes, sizes, self.cfg.resolution)
        common = metrics.box_accuracy(answers, boxes, sizes, self.cfg.resolution, is_common=True)
        figures = {"accuracy": Metric(found["hits"]), "accuracy_common": Metric(common["hits"])}
        figures["mean_iou"] = Metric(found["iou"])
        return Scores(with_groups(figures, items), found["iou"], found["unparsable"])
