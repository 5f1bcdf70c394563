"""The measurements of `make quickstart`: after both stages, with controls that show where the answers come from."""

import base64
import io
from pathlib import Path

import torch
from PIL import Image

from minigpt4.quickstart import evaluate as ev
from minigpt4.quickstart import world

DESCRIPTION_TOKENS, QUESTION_TOKENS = 64, 16


def prove(chat, conv, checkpoints: dict[str, Path], count: int) -> tuple[dict, list[dict]]:
    """(report, answers) of `count` held-out images and half as many with left-out pairs; ends with stage 2 loaded.

    Stage 1 alone and the untrained projection talk until they are cut off, so they see a quarter of the images.
    """
    held_out, left_out = ev.draw_tests("held_out", count), ev.draw_tests("left_out", count // 2)
    embeds, few = encode(chat, held_out), max(1, count // 4)
    texts, left_texts = describe(chat, conv, embeds), describe(chat, conv, encode(chat, left_out))
    asked = question(chat, conv, held_out, embeds)
    blank = Image.new("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE), (128, 128, 128))
    blank_texts = describe(chat, conv, chat.encode_images([blank])) * count
    wrong_texts = texts[1:] + texts[:1]
    probe = ev.linear_probe(chat, {"held_out": held_out, "left_out": left_out})

    load_projection(chat.model, checkpoints["stage1"])
    embeds = encode(chat, held_out[:few])
    first_texts, first_asked = describe(chat, conv, embeds), question(chat, conv, held_out[:few], embeds)
    torch.manual_seed(0)
    chat.model.llama_proj.reset_parameters()
    untrained_texts = describe(chat, conv, encode(chat, held_out[:few]))
    load_projection(chat.model, checkpoints["stage2"])

    controls = {"wrong_picture": wrong_texts, "blank_picture": blank_texts, "untrained_projection": untrained_texts}
    report = {
        "pictures": {"held_out": count, "left_out": len(left_out), "after_stage1": few, "untrained_projection": few},
        "held_out": ev.score(held_out, texts),
        "left_out": ev.score(left_out, left_texts),
        "left_out_pairs": ev.score_left_out(left_out, left_texts),
        "questions": ev.score_questions(held_out, asked),
        "linear_probe": probe,
        "after_stage1": ev.score(held_out[:few], first_texts),
        "questions_after_stage1": ev.score_questions(held_out[:few], first_asked),
        "best_constant": ev.best_constant(held_out),
        **{name: ev.score(held_out[: len(said)], said) for name, said in controls.items()},
        "above_chance": {name: ev.above_chance(held_out[: len(said)], said) for name, said in controls.items()},
        "style": {"stage1": ev.style(first_texts), "stage2": ev.style(texts)},
        "stages_side_by_side": [{"stage1": a, "stage2": b} for a, b in zip(first_texts[:5], texts[:5], strict=True)],
        "example": {"question": held_out[0].question.text, "answer": asked[0], "description": texts[0]},
    }
    return report, [record(test, *said) for test, *said in zip(held_out, texts, asked, strict=True)]


def encode(chat, tests) -> list[torch.Tensor]:
    return ev.encode(chat, [test.image for test in tests])


def describe(chat, conv, embeds) -> list[str]:
    return ev.ask(chat, conv, embeds, [ev.DESCRIBE] * len(embeds), DESCRIPTION_TOKENS)


def question(chat, conv, tests, embeds) -> list[str]:
    return ev.ask(chat, conv, embeds, [test.question.text for test in tests], QUESTION_TOKENS)


def load_projection(model, checkpoint: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    model.load_trainable(state, "quickstart", path=checkpoint)


def record(test, description: str, answer: str) -> dict:
    """One line of answers.jsonl, with the image as base64 JPEG."""
    buffer = io.BytesIO()
    test.image.save(buffer, "JPEG", quality=95)
    marks = ev.marks(test.scene, description)
    return {
        "description": description,
        "is_right": marks["exact"][0],
        "wrong": [name for name in ev.ATTRIBUTES if not all(marks[name])],
        "question": test.question.text,
        "expected": test.question.answer,
        "answer": answer,
        "answer_is_right": test.question.is_answered_by(answer),
        "picture": base64.b64encode(buffer.getvalue()).decode(),
    }
