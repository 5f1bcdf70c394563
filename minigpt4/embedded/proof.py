"""The measurements of `make quickstart`: after both stages, with controls that show where the answers come from."""

import base64
import io
from pathlib import Path

import torch
from PIL import Image

from minigpt4.embedded import evaluate as ev
from minigpt4.embedded import world

DESCRIPTION_TOKENS, QUESTION_TOKENS = 96, 20


def prove(chat, conv, checkpoints: dict[str, Path], count: int) -> tuple[dict, list[dict]]:
    """(report, answers) of `count` held-out pictures and half as many with left-out pairs; ends with stage 2 loaded."""
    held_out, left_out = ev.draw_tests("held_out", count), ev.draw_tests("left_out", count // 2)
    report = {"pictures": {"held_out": len(held_out), "left_out": len(left_out)}}
    report["linear_probe"] = {
        "held_out": ev.linear_probe(chat, held_out),
        "left_out": ev.linear_probe(chat, left_out),
    }

    texts = describe(chat, conv, held_out)
    report["held_out"] = ev.score(held_out, texts)
    asked = question(chat, conv, held_out)
    report["questions"] = ev.score_questions(held_out, asked)
    left_texts = describe(chat, conv, left_out)
    report["left_out"] = ev.score(left_out, left_texts)
    report["left_out_pairs"] = ev.score_left_out(left_out, left_texts)
    report["style"] = {"stage2": ev.style(texts)}
    report["best_constant"] = ev.best_constant(held_out)
    report["wrong_picture"] = ev.score(held_out, texts[1:] + texts[:1])
    report["blank_picture"] = blank_picture(chat, conv, held_out)

    few = held_out[: max(1, count // 4)]
    load_projection(chat.model, checkpoints["stage1"])
    first_texts = describe(chat, conv, few)
    report["after_stage1"] = ev.score(few, first_texts)
    report["questions_after_stage1"] = ev.score_questions(few, question(chat, conv, few))
    report["style"]["stage1"] = ev.style(first_texts)
    torch.manual_seed(0)
    chat.model.llama_proj.reset_parameters()
    report["untrained_projection"] = ev.score(few, describe(chat, conv, few))
    load_projection(chat.model, checkpoints["stage2"])

    answers = [record(test, *said) for test, *said in zip(held_out, texts, asked, strict=True)]
    report["example"] = {"question": held_out[0].question.text, "answer": asked[0], "description": texts[0]}
    report["stages_side_by_side"] = [
        {"stage1": a, "stage2": b} for a, b in zip(first_texts[:5], texts[:5], strict=True)
    ]
    return report, answers


def describe(chat, conv, tests) -> list[str]:
    embeds = ev.encode(chat, [test.image for test in tests])
    return ev.ask(chat, conv, embeds, [ev.DESCRIBE] * len(tests), DESCRIPTION_TOKENS)


def question(chat, conv, tests) -> list[str]:
    embeds = ev.encode(chat, [test.image for test in tests])
    return ev.ask(chat, conv, embeds, [test.question.text for test in tests], QUESTION_TOKENS)


def blank_picture(chat, conv, tests) -> dict[str, float]:
    """Scores of what is said about a grey picture without anything on it, held against every test."""
    blank = Image.new("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE), (128, 128, 128))
    (text,) = ev.ask(chat, conv, ev.encode(chat, [blank]), [ev.DESCRIBE], DESCRIPTION_TOKENS)
    return ev.score(tests, [text] * len(tests))


def load_projection(model, checkpoint: Path) -> None:
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    model.load_trainable(state, "quickstart", path=checkpoint)


def record(test, description: str, answer: str) -> dict:
    """One line of answers.jsonl, with the picture as base64 JPEG."""
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
        "answer_is_right": ev.reading.is_right(test.question, answer),
        "picture": base64.b64encode(buffer.getvalue()).decode(),
    }
