"""Rows: the token ids and labels of each sample, as the LLM reads it. Only this module makes labels and cuts rows.

    BOS <prompt, with image slots> <answer + end symbol> [<next question> <answer + end symbol> ..]

`batch_rows` makes the rows of training, validation and preview, `context_ids` the ids of a chat. Both take segments (a
sample's are made in `sample_segments.py`), use the same encoder, and begin with BOS (`PromptEncoder.bos`). How a batch of
rows is laid out in memory, packed or padded, is decided in `models/llm/layouts.py`. This module needs only the tokenizer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from minigpt4.text.cutting import warn_of_cut_prompt
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.sample_segments import TextSettings, sample_segments
from minigpt4.text.segments import IMAGE, Segment, Text
from minigpt4.text.templates import Template

IMAGE_ID = -1  # in `Row.ids`, marks each position of an image feature vector
IGNORED = -100  # label of a position without loss


class Row(NamedTuple):
    """One sample as the LLM reads it.

    `ids`: token ids, with IMAGE_ID at each position of an image feature vector. `labels`: the token id at each target,
    IGNORED elsewhere. `num_prompt`: number of positions before the first answer. `images`: the sample's images, as
    indices into the batch's images, in the order of their slots. `num_cut`: number of positions that were cut off.
    """

    ids: list[int]
    labels: list[int]
    num_prompt: int
    images: range
    num_cut: int

    @property
    def num_targets(self) -> int:
        """The number of target positions."""
        return sum(label != IGNORED for label in self.labels)


def batch_rows(
    samples: dict,
    prompt: str,
    settings: TextSettings,
    encoder: PromptEncoder,
    num_image_tokens: int,
) -> list[Row]:
    """Return the Row of each sample of a batch.

    `samples` has "text_input", a list of captions or answers. It may have lists, also with one entry a sample, of
    "num_images" (1 each if absent), "instruction" (a text, '' for none) and "turns" ((question, answer) pairs, () for
    none). A question is a text, or a sequence of texts and IMAGE; if no question has an IMAGE, the sample's images go
    before the first one. Or it is Marked: a Marked instruction is the whole prompt, unless `settings.chat_template`
    puts it into the template. `prompt`, drawn for this batch, is for samples without instruction and turns.

    The prompt after BOS is cut to `settings.max_context_len` positions, the rest to `settings.max_txt_len`. Raises
    ValueError for questions without a prompt template, which is needed to separate them from answers, and where the
    number of image slots is not the number of images.
    """
    counts = image_counts(samples)
    keys = [key for key in ("text_input", "instruction", "turns") if samples.get(key)]
    segments = []
    for number, num_images in enumerate(counts):
        sample = {key: samples[key][number] for key in keys}
        segments.append(sample_segments(sample, prompt, num_images, settings))
    # one call of the tokenizer for the whole batch
    encoded = encoder.encode_batch(segments)
    # the batch's images are those of its samples, one sample after the other
    images = [range(*bounds) for bounds in pairwise(accumulate(counts, initial=0))]
    pairs = zip(encoded, images, strict=True)
    return [_row(parts, own, num_image_tokens, settings, encoder) for parts, own in pairs]


@contextmanager
def faults_named(samples: dict, *arguments: Any) -> Iterator[None]:
    """Within the block, which calls `batch_rows` with these arguments, turn a sample's error into a ValueError with its id.

    A ValueError that every sample raises is no fault of the samples, and is raised unchanged.
    """
    errors = (TypeError, AttributeError, KeyError, ValueError)
    try:
        yield
    except errors as error:
        # find the faulty samples by making the row of each alone
        num_samples = len(samples["text_input"])
        faulty = {}
        for index in range(num_samples):
            try:
                batch_rows(_part_of_batch(samples, index, index + 1), *arguments)
            except errors as fault:
                faulty[index] = fault
        if not faulty or (len(faulty) == num_samples and isinstance(error, ValueError)):
            raise
        ids = samples.get("sample_id") or range(num_samples)
        named = "; ".join(f"{ids[index]}: {fault!s:.200}" for index, fault in faulty.items())
        raise ValueError(
            f"the text of {len(faulty)} of the batch's {num_samples} samples cannot be read ({named}). Correct or remove "
            "them, or let the dataset skip them: docs/custom_data.md"
        ) from error


def image_counts(samples: dict) -> list[int]:
    """Return the number of images of each sample of a batch."""
    counts = samples.get("num_images")
    return [1] * len(samples["text_input"]) if counts is None else list(counts)


def context_ids(
    segments: Sequence[Segment], encoder: PromptEncoder, image_sizes: Sequence[int]
) -> list[int]:
    """Return the ids of a dialogue up to the answer to be generated; the k-th image takes `image_sizes[k]` positions."""
    sizes = iter(image_sizes)
    ids = []
    for piece in encoder.encode(segments):
        ids += [IMAGE_ID] * next(sizes) if piece is IMAGE else piece
    return ids


def answer_row(
    segments: Sequence[Segment],
    answer: str,
    template: Template,
    encoder: PromptEncoder,
    image_sizes: Sequence[int],
    images: range,
) -> Row:
    """Return the Row of a dialogue (see `context_ids`) followed by a given answer and its end symbol.

    As in training the answer is tokenised by itself; it is never cut, and all of it is a target.
    """
    prompt = context_ids(segments, encoder, image_sizes)
    end = template.stop[0] if template.stop else ""
    target = [
        Text(template.neutralise(answer), is_target=True),
        Text(end, is_structure=True, is_target=True),
    ]
    answer_ids = []
    for content, _ in encoder.encode_batch([target])[0]:
        answer_ids += content
    labels = [IGNORED] * len(prompt) + answer_ids
    return Row([*prompt, *answer_ids], labels, len(prompt), images, num_cut=0)


def _row(
    parts: list,
    images: range,
    num_image_tokens: int,
    settings: TextSettings,
    encoder: PromptEncoder,
) -> Row:
    """Return the Row of encoded parts, cut to the limits. A question whose answer is cut off is cut off, too.

    What is left after the prompt begins with an answer.
    """
    masked = _masked_ids(settings, encoder)
    ids = list(encoder.bos)
    labels, is_target = [IGNORED] * len(ids), [False] * len(ids)
    for content, is_answer in parts:
        content = [IMAGE_ID] * num_image_tokens if content is IMAGE else content
        ids += content
        labels += [token if is_answer and token not in masked else IGNORED for token in content]
        is_target += [is_answer] * len(content)
    if labels:
        labels[0] = IGNORED  # no position before it could predict it
    num_prompt = is_target.index(True) if any(is_target) else len(ids)
    # cut the prompt at its end; `images` loses its last ones, so none may follow those that are cut
    excess = num_prompt - len(encoder.bos) - settings.max_context_len
    if excess > 0:
        warn_of_cut_prompt(settings.max_context_len)
        cut = slice(num_prompt - excess, num_prompt)
        if IMAGE_ID in ids[cut] and IMAGE_ID in ids[num_prompt:]:
            raise ValueError(
                "the first question is cut within or before an image, and a later one has another image"
            )
        for values in (ids, labels, is_target):
            del values[cut]
        num_prompt -= excess
    # cut the rest to the limit, then back to the end of an answer
    end = min(len(ids), num_prompt + settings.max_txt_len)
    while end > num_prompt and not is_target[end - 1]:
        end -= 1
    num_kept = math.ceil(ids[:end].count(IMAGE_ID) / num_image_tokens)  # the last one may be cut
    return Row(ids[:end], labels[:end], num_prompt, images[:num_kept], len(ids) - end)


def _masked_ids(settings: TextSettings, encoder: PromptEncoder) -> set[int]:
    """Return the ids that are never learnt: with `mask_eos_labels` the pad token, which is also the end token."""
    return {encoder.tokenizer.pad_token_id} if settings.mask_eos_labels else set()


def end_problem(settings: TextSettings, encoder: PromptEncoder) -> str | None:
    """Return what is wrong with the end symbol if none of its tokens is a target; None if the model learns to stop."""
    (end,) = encoder.encode_batch([[Text(settings.end_sym, is_structure=True)]])
    ids = set(chain.from_iterable(piece for piece, _ in end))
    if not ids:
        return "model.end_sym is empty: no end would be learnt, and the model would never stop. Set it to the end token"
    if not ids <= _masked_ids(settings, encoder):
        return None
    return (
        f"model.end_sym {settings.end_sym!r} is the end token, and would not be learnt: the model would never stop. "
        "Set model.mask_eos_labels=False (True is 2023's way, for an end_sym of other tokens)"
    )


def split_batch(samples: dict, rows: Sequence[Row], max_tokens: int) -> list[tuple[dict, float]]:
    """Split a batch into parts with at most `max_tokens` positions; return [(part, its share of the batch's targets)].

    A longer sample is a part by itself. Parts without targets are left out; a batch without targets is not split.
    """
    total = sum(row.num_targets for row in rows)
    if not total:
        return [(samples, 1)]
    starts, part_length = [0], 0
    for number, row in enumerate(rows):
        if part_length and part_length + len(row.ids) > max_tokens:
            starts.append(number)
            part_length = 0
        part_length += len(row.ids)
    parts = []
    for start, stop in pairwise([*starts, len(rows)]):
        share = sum(row.num_targets for row in rows[start:stop]) / total
        if share:
            parts.append((_part_of_batch(samples, start, stop), share))
    return parts


def _part_of_batch(samples: dict, start: int, stop: int) -> dict:
    """Return the batch of samples `start` to `stop` - 1, with their images."""
    counts = image_counts(samples)
    images = slice(sum(counts[:start]), sum(counts[:stop]))
    part = {}
    for key, value in samples.items():
        if value is None or isinstance(value, (int, float, str)):  # of the whole step, as "iters"
            part[key] = value
        else:
            part[key] = value[images] if key == "image" else value[start:stop]
    return part
