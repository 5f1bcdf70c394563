"""Batches as the newest release's datasets give them, in the form that `rows.batch_rows` describes."""

from typing import Any

from minigpt4.text.segments import Marked

# the release's keys, a text a sample
TEXTS = ("answer", "instruction_input", "conv_q", "conv_a", "connect_sym")
_OURS = ("text_input", "instruction", "turns")


def from_release(samples: dict[str, Any]) -> dict[str, Any]:
    """Return a batch in our form; one that is in it already comes back as it is.

    The release's form: "image" [B, 3, S, S], or [B, N, 3, S, S] with "length", how many of the N are the sample's; none
    for text alone. Per sample "answer" and, if it has one, "instruction_input"; or "conv_q" and "conv_a", turns joined
    by "connect_sym". An absent entry of one sample is empty. Raises ValueError that names the sample.
    """
    if not any(key in samples for key in TEXTS):
        return samples
    others = {
        key: value
        for key, value in samples.items()
        if key not in (*TEXTS, "image", "length", "num_images")
    }
    size = len(next(samples[key] for key in TEXTS if key in samples))
    ours = {key: [] for key in _OURS}
    for number in range(size):
        sample = {
            key: samples[key][number] for key in TEXTS if key in samples and samples[key][number]
        }
        turns = _turns(sample, (samples.get("sample_id") or range(size))[number])
        ours["turns"].append(turns)
        ours["text_input"].append(turns[0][1] if turns else sample.get("answer", ""))
        ours["instruction"].append(Marked(sample.get("instruction_input", "")))
    return others | ours | _images(samples, size)


def _turns(sample: dict[str, str], name: Any) -> tuple[tuple[Marked, str], ...]:
    """Return the (question, answer) pairs of a sample."""
    if "conv_q" not in sample:
        return ()
    if "connect_sym" not in sample:
        raise ValueError(
            f"sample {name}: conv_q without connect_sym; expected what joins its turns, such as '!@#'"
        )
    questions, answers = (
        sample.get(key, "").split(sample["connect_sym"]) for key in ("conv_q", "conv_a")
    )
    if len(questions) != len(answers):
        raise ValueError(
            f"sample {name}: {len(questions)} questions in conv_q, {len(answers)} answers in conv_a; expected as many, "
            f"joined by {sample['connect_sym']!r}"
        )
    return tuple(
        (Marked(question), answer) for question, answer in zip(questions, answers, strict=True)
    )


def _images(samples: dict[str, Any], size: int) -> dict[str, Any]:
    """Return "image" [I, 3, S, S] of all samples in order, and "num_images"."""
    import torch  # a preview, and --help, have no images

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
