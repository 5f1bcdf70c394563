"""Captioning: COCO, Flickr30k and NoCaps, from COCO's own files or Karpathy's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt4.common.registry import registry
from minigpt4.evaluation import metrics
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.benchmarks.files import field, ident, mapping, read_json, rows
from minigpt4.evaluation.benchmarks.scores import Metric, Scores, num_empty


@dataclass
class CaptionConfig(BenchmarkConfig):
    prompt: str = "caption"
    max_new_tokens: int = 60
    split: str = "test"  # for Karpathy's file; COCO's files have one split each


@registry.register_benchmark("coco_caption")
@registry.register_benchmark("flickr30k")
@registry.register_benchmark("nocaps")
class CocoCaption(Benchmark):
    """One caption for each image.

    `eval_file_path`: COCO's `captions_val2014.json` (NoCaps has the same form: `nocaps_val_4500_captions.json`)
        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    or Karpathy's `dataset_coco.json` or `dataset_flickr30k.json`, of which `split` is taken
        {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
    `img_path`: the folder of the images; they may be in its sub-folders `train2014` and `val2014`.
    """

    Config = CaptionConfig
    RULES = f"CIDEr-D, BLEU and ROUGE-L of coco-caption (0 to 10, 1, 1); words: {metrics.CAPTION_TOKENIZER}"
    HEADLINE = "CIDEr-D"
    ASKS = False

    def items(self) -> list[BenchmarkItem]:
        path = self.find("*captions*.json", "dataset_*.json")
        content = mapping(read_json(path), f"'{path}'")
        images = list(rows(content, "images", path))
        is_karpathy = bool(images) and "sentences" in images[0][1]
        found = (
            _of_karpathy(images, self.cfg.split) if is_karpathy else _of_coco(images, content, path)
        )
        question = self.prompt().ask()
        return [
            BenchmarkItem(name, (self.image(*files),), question, captions)
            for name, files, captions in found
        ]

    def score(self, items: Sequence[BenchmarkItem], answers: Mapping[str, str]) -> Scores:
        return caption_scores({item.id: item.reference for item in items}, answers)


def caption_scores(references: Mapping[str, list[str]], answers: Mapping[str, str]) -> Scores:
    """Return CIDEr-D, BLEU-4, BLEU-1 and ROUGE-L; the score of each item is its CIDEr-D."""
    words = metrics.caption_words
    cider = metrics.cider_d(references, answers, words)[1]
    rouge = metrics.rouge_l(references, answers, words)[1]
    counts = metrics.bleu_counts(references, answers, words)
    found = {
        "CIDEr-D": Metric(cider),
        "BLEU-4": Metric(counts, lambda rows: metrics.bleu_of(rows.sum(axis=0))[3]),
        "BLEU-1": Metric(counts, lambda rows: metrics.bleu_of(rows.sum(axis=0))[0]),
        "ROUGE-L": Metric(rouge),
    }
    return Scores(found, cider, num_empty(answers))


Captioned = tuple[str, list[str], list[str]]  # id, possible file names of the image, captions


def _of_coco(images: list[tuple[str, dict]], content: dict, path: Path) -> Iterator[Captioned]:
    """Yield the images of COCO's file that have captions."""
    files = {ident(row, "id", where): field(row, "file_name", str, where) for where, row in images}
    captions: dict[str, list[str]] = {}
    for where, row in rows(content, "annotations", path):
        image = ident(row, "image_id", where)
        if image not in files:
            raise ValueError(
                f"{where}: there is no image '{image}' among the {len(files)} images of the file"
            )
        captions.setdefault(image, []).append(field(row, "caption", str, where))
    for image, texts in captions.items():
        yield image, [files[image], f"val2014/{files[image]}"], texts


def _of_karpathy(images: list[tuple[str, dict]], split: str) -> Iterator[Captioned]:
    """Yield the images of a split of Karpathy's file. Raises ValueError for an unknown split."""
    splits = {field(row, "split", str, where) for where, row in images}
    if split not in splits:
        raise ValueError(
            f"split: '{split}' is not in the file; there are {', '.join(sorted(splits))}"
        )
    for where, row in images:
        if row["split"] == split:
            name = field(row, "filename", str, where)
            texts = [
                field(sentence, "raw", str, where)
                for sentence in field(row, "sentences", list, where)
            ]
            yield name, [name, f"{row.get('filepath', '')}/{name}"], texts
