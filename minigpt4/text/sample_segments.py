"""The segments of one training sample: prompt, image slots, questions and answers within the template's fixed text."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from minigpt4.text.segments import (
    IMAGE,
    IMAGE_SLOT,
    Marked,
    Part,
    Segment,
    Text,
    dialogue_segments,
    marked_segments,
    message_segments,
    prompt_segments,
)
from minigpt4.text.templates import Template, template_for


class TextSettings(Protocol):
    """The settings that determine how text becomes rows; both the section `model` and the model have them."""

    prompt_template: str
    end_sym: str
    max_txt_len: int
    max_context_len: int
    chat_template: bool
    mask_eos_labels: bool


def sample_segments(
    sample: dict, prompt: str, num_images: int, settings: TextSettings
) -> list[Segment]:
    """Return the segments of one training sample; see `batch_rows`."""
    turns, caption = sample.get("turns"), sample["text_input"]
    instruction = sample.get("instruction")
    # one answer after a prompt that is complete: the drawn one, or a Marked instruction
    is_whole_prompt = isinstance(instruction, Marked) and not settings.chat_template
    if not turns and (not instruction or is_whole_prompt):
        answer = Text(caption + settings.end_sym, is_structure=True, is_target=True)
        if not instruction:
            return [*_prompt_with_images(prompt, num_images), answer]
        _check_slots("instruction", instruction.num_images, num_images)
        return [*prompt_segments(instruction), answer]
    # else questions and answers, within the fixed text of the LLM's template
    template = _training_template(settings.prompt_template, settings.end_sym)
    if not turns:
        is_marked = isinstance(instruction, Marked)  # the newest release's, which changes no answer
        turns = [(instruction, Text(caption, is_structure=True) if is_marked else caption)]
    questions = _with_images([question for question, _ in turns], num_images)
    messages = []
    for question, (_, answer) in zip(questions, turns, strict=True):
        segments_of = marked_segments if isinstance(question, Marked) else message_segments
        messages.append((True, segments_of(question, template.neutralise)))
        if isinstance(answer, Text):  # the caption from above
            messages.append((False, [answer]))
        else:
            messages.append((False, message_segments([answer], template.neutralise)))
    return dialogue_segments(template, messages)


@lru_cache  # called for each sample of each batch
def _training_template(prompt_template: str, end_sym: str) -> Template:
    """Return the Template with `prompt_template` around each question and `end_sym` after each answer."""
    if not prompt_template:
        raise ValueError(
            "model.prompt_template: '' cannot tell the questions of a conversation from its answers; set the LLM's "
            "own, e.g. '###Human: {} ###Assistant: ' for Vicuna v0, or use data with captions alone"
        )
    return template_for(prompt_template, end_sym).for_training(prompt_template, end_sym)


def _prompt_with_images(prompt: str, num_images: int) -> list[Segment]:
    """Return the segments of a drawn prompt, with all images in its one slot; without images there is no prompt."""
    if not num_images or not prompt:
        return [IMAGE] * num_images
    segments = prompt_segments(prompt)
    if segments.count(IMAGE) != 1:
        raise ValueError(
            f"prompt {prompt!r} has {segments.count(IMAGE)} {IMAGE_SLOT}; expected exactly one"
        )
    slot = segments.index(IMAGE)
    return [*segments[:slot], *[IMAGE] * num_images, *segments[slot + 1 :]]


def _with_images(
    questions: Sequence[str | Sequence[Part]], num_images: int
) -> list[Marked | Sequence[Part]]:
    """Return each question as Marked or as parts; if no question has a slot, all images go before the first one."""
    questions = [(question,) if type(question) is str else question for question in questions]
    num_slots = 0
    for question in questions:
        is_marked = isinstance(question, Marked)
        num_slots += question.num_images if is_marked else tuple(question).count(IMAGE)
    first, *others = questions
    if not num_slots and not isinstance(first, Marked):
        return [(*[IMAGE] * num_images, *first), *others]
    _check_slots("turns", num_slots, num_images)
    return questions


def _check_slots(where: str, num_slots: int, num_images: int) -> None:
    if num_slots != num_images:
        raise ValueError(
            f"{where}: {num_slots} image slots in the questions, the sample has {num_images} images"
        )
