"""RefCOCO, RefCOCO+ and RefCOCOg: where is what a phrase names? The answer is a box."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, with_groups

COCO_NAME = 27  # letters of COCO_train2014_000000580957, before _0, the number of the object


@dataclass
class RefCOCOConfig(BenchmarkConfig):
    prompt: str = "minigpt_v2_refer"
    resolution: int = 100  # a box is said in 0..resolution


@registry.register_benchmark("refcoco")
@registry.register_benchmark("refcoco+")
@registry.register_benchmark("refcocog")
class RefCOCO(Benchmark):
    """`eval_file_path`: a file `refcoco_val.json`, or the folder with those of all splits, or that folder's parent

        [{"img_id": "COCO_train2014_000000580957_0", "sents", "bbox": [x, y, width, height], "height", "width"}]
    `img_path`: the folder of COCO's train2014. A split has figures of its own.
    """

    Config = RefCOCOConfig
    RULES = "MiniGPT-4, eval_ref.py, without asking again: IoU of inclusive pixels > 0.5; no box is wrong"

    def items(self) -> list[BenchmarkItem]:
        prompt, items = self.prompt(), []
        for path in self.find_all(f"{self.name}_*.json", f"{self.name}/{self.name}_*.json"):
            split = path.stem.rpartition("_")[2]
            for number, (where, row) in enumerate(rows(read_json(path), "", path)):
                image = self.image(field(row, "img_id", str, where)[:COCO_NAME] + ".jpg")
                size = [field(row, key, int, where) for key in ("width", "height")]
                truth = {"box": field(row, "bbox", list, where), "size": size}
                question = prompt.ask(field(row, "sents", str, where))
                items.append(BenchmarkItem(f"{split}/{number}", (image,), question, truth, split))
        return items

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        boxes = {item.id: item.reference["box"] for item in items}
        sizes = {item.id: item.reference["size"] for item in items}
        found = metrics.box_accuracy(answers, boxes, sizes, self.cfg.resolution)
        hits = {name: float(iou > 0.5) for name, iou in found["iou"].items()}
        figures = {"accuracy": Metric(hits), "mean_iou": Metric(found["iou"])}
        return Scores(with_groups(figures, items), found["iou"], found["unparsable"])
