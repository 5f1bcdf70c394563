"""samples.html: a model's answers to a few held-out samples during training, on a self-contained page."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.datasets.sheet import visible
from minigpt4.evaluation.answer_file import write_whole
from minigpt4.evaluation.page import STYLE, document, image_element

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

MOST_TOKENS = 60  # at most so many tokens per answer
RECORDS, PAGE = "samples.jsonl", "samples.html"
_STYLE = """figure{display:flex;gap:1rem;white-space:normal;margin-bottom:.8rem;flex-wrap:wrap}
figure>div{flex:1 1 24rem}figure img{width:14rem}td{white-space:pre-wrap}
"""


def fixed_samples(dataset: Any, number: int) -> list[dict]:
    """Return at most `number` samples of a split, always the same: evenly spaced, or the first ones of a stream.

    A sample that cannot be used is replaced by the next.
    """
    if not hasattr(dataset, "__len__"):
        return list(islice(dataset, number))
    size, chosen = len(dataset), []
    number = min(number, size)
    # one sample from each of `number` equal parts
    for part in range(number):
        for index in range(part * size // number, (part + 1) * size // number):
            sample = dataset[index]
            if sample is not None:
                chosen.append(sample)
                break
    return chosen


class SamplesPage:
    """The page of a few samples of a dataset; each validation adds one answer per sample.

    The answers are also in `samples.jsonl` beside it, one JSON line per validation.
    """

    def __init__(self, dataset: Any, number: int) -> None:
        self.dataset = dataset
        self.samples = fixed_samples(dataset, number)

    def add(self, model: "torch.nn.Module", folder: Path, **where: object) -> None:
        """Answer the samples and update samples.jsonl and the page in `folder`.

        `where` has "step" and further fields of the new record, which replaces a record of the same step. Raises
        ValueError for a text that the model cannot read, and OSError.
        """
        from minigpt4.common.device import to_device
        from minigpt4.conversation.sample_answers import answer_samples
        from minigpt4.datasets.datasets.collate import collate

        if not self.samples:
            return
        batch = to_device(collate(self.samples), model.device) | {"iters": 0}
        answers = answer_samples(model, batch, MOST_TOKENS)
        answered = []
        for sample, (prompt, answer) in zip(self.samples, answers, strict=True):
            # "text_input" in data of the 2023 release and of users, the others in data of the newest release
            reference = next(
                sample[key] for key in ("text_input", "answer", "conv_a") if key in sample
            )
            answered.append(
                {
                    "id": str(sample.get("sample_id", "")),
                    "prompt": prompt,
                    "answer": answer,
                    "reference": reference,
                }
            )
        records = add_record(folder / RECORDS, {**where, "samples": answered})
        title, images = f"Held-out samples: {folder.name}", list(map(self._images, self.samples))
        page = samples_page(title, records, answered, images)
        write_whole(folder / PAGE, page.encode("utf-8", "backslashreplace"))

    def _images(self, sample: dict) -> "list[Image]":
        """Return the images of a sample as the model sees them; [] if its processor cannot convert them back."""
        from PIL import Image

        from minigpt4.datasets.datasets.image_controls import images_of

        shown = []
        to_image = getattr(getattr(self.dataset, "vis_processor", None), "to_image", None)
        for pixels in images_of(sample):
            if str(pixels.dtype) == "torch.uint8":  # not yet normalised: [height, width, 3]
                shown.append(Image.fromarray(pixels.numpy()))
            elif to_image:
                shown.append(to_image(pixels))
        return shown


def read_records(path: Path) -> list[dict]:
    """Return the records of a samples.jsonl, [] if there is none; a partial line is skipped."""
    records = []
    # not splitlines: an answer may contain U+2028
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def add_record(path: Path, record: dict) -> list[dict]:
    """Add a record to a samples.jsonl, in place of one of the same step; return all records, by step.

    A resumed run repeats steps. The file is replaced as a whole, so that a kill loses no record.
    """
    records = [other for other in read_records(path) if other["step"] != record["step"]]
    records = sorted([*records, record], key=lambda each: each["step"])
    text = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records)
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    return records


def samples_page(
    title: str,
    records: Sequence[dict],
    samples: Sequence[dict],
    images: "Sequence[Sequence[Image]]",
) -> str:
    """Return the page's HTML: one card per sample, with images, prompt, reference and the answer of each record.

    `samples` are those of the newest record, whose step need not be the last; other records may have other samples.
    """
    note = f"Greedy answers, at most {MOST_TOKENS} tokens, to the prompts that training reads."
    body = [f"<h1>{visible(title)}</h1>", f"<p>{note}</p>"]
    for number, (newest, its_images) in enumerate(zip(samples, images, strict=True)):
        rows = []
        for record in records:
            loss = record.get("loss")
            shown_loss = "" if loss is None else f"{loss:.4f}"
            cells = f'<td class="n">{record["step"]}</td><td class="n">{shown_loss}</td>'
            answer = _answer_in(record, number, newest["id"])
            rows.append(f"<tr>{cells}<td>{visible(answer)}</td></tr>\n")
        head = '<tr><th class="n">step</th><th class="n">held-out loss</th><th>answer</th></tr>'
        terms = [
            f"<dt>{name}</dt><dd>{visible(newest[name])}</dd>" for name in ("prompt", "reference")
        ]
        table = f'<div class="scroll"><table>{head}\n{"".join(rows)}</table></div>'
        text = f"<div class=id>{visible(newest['id'])}</div><dl>{''.join(terms)}</dl>{table}"
        body.append(f"<figure>{''.join(map(image_element, its_images))}<div>{text}</div></figure>")
    return document(title, STYLE + _STYLE, body)


def _answer_in(record: dict, number: int, sample_id: str) -> str:
    """Return a sample's answer in a record, "" if it has none. Samples of a dataset without ids are told by their place."""
    at_its_place = record["samples"][number : number + 1]
    same = [each for each in at_its_place + record["samples"] if each["id"] == sample_id]
    return same[0]["answer"] if same else ""
