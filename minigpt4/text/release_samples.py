"""Batches in the form of the newest release's datasets, converted to the form that `rows.batch_rows` describes."""

from typing import Any

from minigpt4.text.segments import Marked

# the release's keys, with one text a sample
TEXTS = ("answer", "instruction_input", "conv_q", "conv_a", "connect_sym")
_OURS = {"text_input": "", "instruction": "", "turns": ()}  # our keys, with their empty entries


def from_release(samples: dict[str, Any]) -> dict[str, Any]:
    """Return a batch in our form; a batch that is in our form already is returned unchanged.

    The release's form: "image" [B, 3, S, S], or [B, N, 3, S, S] with "length", the number of each sample's images; absent
    for text alone. Per sample "answer" and, if it has one, "instruction_input"; or "conv_q" and "conv_a", turns joined
    by "connect_sym". An empty entry means that the sample lacks it; what it has in our form instead is kept. Raises
    ValueError that names the sample.
    """
    text_keys = [key for key in TEXTS if key in samples]
    if not text_keys:
        return samples
    converted = (*TEXTS, "image", "length", "num_images")
    others = {key: value for key, value in samples.items() if key not in converted}
    size = len(samples[text_keys[0]])
    names = samples.get("sample_id") or range(size)
    ours = {key: [] for key in _OURS}
    own_keys = [key for key in _OURS if samples.get(key)]
    for number in range(size):
        sample = {key: samples[key][number] for key in text_keys if samples[key][number]}
        own = {key: samples[key][number] for key in own_keys if samples[key][number]}
        for key, value in (_OURS | own | _in_our_form(sample, names[number])).items():
            ours[key].append(value)
    return others | ours | _images(samples, size)


def _in_our_form(sample: dict[str, str], name: Any) -> dict[str, Any]:
    """Return the texts that a sample has in the release's form, under our keys."""
    ours = {}
    if "instruction_input" in sample:
        ours["instruction"] = Marked(sample["instruction_input"])
    if turns := _turns(sample, name):
        ours |= {"turns": turns, "text_input": turns[0][1]}
    elif "answer" in sample:
        ours["text_input"] = sample["answer"]
    return ours


def _turns(sample: dict[str, str], name: Any) -> tuple[tuple[Marked, str], ...]:
    """Return the (question, answer) pairs of a sample."""
    if "conv_q" not in sample:
        return ()
    if "connect_sym" not in sample:
        raise ValueError(
            f"sample {name}: conv_q without connect_sym; expected what joins its turns, such as '!@#'"
        )
    separator = sample["connect_sym"]
    questions = sample["conv_q"].split(separator)
    answers = sample.get("conv_a", "").split(separator)
    if len(questions) != len(answers):
        raise ValueError(
            f"sample {name}: {len(questions)} questions in conv_q, {len(answers)} answers in conv_a; expected as many, "
            f"joined by {separator!r}"
        )
    return tuple(zip(map(Marked, questions), answers, strict=True))


def _images(samples: dict[str, Any], size: int) -> dict[str, Any]:
    """Return "image" [I, 3, S, S], the images of all samples in order, and "num_images", their number of each sample."""
    import torch  # not at the top: --help and a preview do without it

    image = samples.get("image")
    if image is None:
        return {"image": torch.empty(0, 3, 0, 0), "num_images": [0] * size}
    if image.ndim != 5:
        return {"image": image, "num_images": list(samples.get("num_images") or [1] * size)}
    counts = [int(count) for count in samples.get("length", [image.shape[1]] * size)]
    if len(counts) != size or not all(0 <= count <= image.shape[1] for count in counts):
        raise ValueError(
            f"length: {counts}; expected for each of {size} samples 0 to {image.shape[1]}, its images"
        )
    groups = [of_one[:count] for of_one, count in zip(image, counts, strict=True)]
    return {"image": torch.cat(groups), "num_images": counts}
