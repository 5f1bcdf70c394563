"""The evaluation of `make quickstart`: accuracies after both stages, beside controls."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from minigpt4.common.utils import file_sha256
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.conversation import Conversation
from minigpt4.evaluation import answering
from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem
from minigpt4.evaluation.results import read_results
from minigpt4.evaluation.run import Asked, OpenBenchmark, make_benchmark, run_benchmarks
from minigpt4.quickstart import evaluate, world
from minigpt4.quickstart.drawn_world import DrawnConfig
from minigpt4.quickstart.evaluate import Test

DESCRIPTION_TOKENS, QUESTION_TOKENS = 64, 16


def measure(
    chat: Chat, conv: Conversation, checkpoints: dict[str, Path], count: int, output: Path
) -> tuple[dict, list[dict]]:
    """Return the report on `count` held-out images and half as many with left-out pairs, and the lines of answers.jsonl.

    The benchmarks on the held-out images write their results, with intervals and pages, to `output`. Stage 1 alone and
    the untrained projection generate up to the token limit, so they get a quarter of the images. `chat` has the weights
    of stage 2 before and after.
    """
    # after stage 2, and the controls that need no other weights
    held_out = evaluate.draw_tests("held_out", count)
    left_out = evaluate.draw_tests("left_out", count // 2)
    few = held_out[: max(1, count // 4)]
    benchmarks = run_drawn_benchmarks(chat, conv, checkpoints["stage2"], count, output)
    (held_out_score, texts), (questions_score, answers) = map(read_benchmark, benchmarks)
    left_texts = describe(chat, conv, left_out)
    blank = Image.new("RGB", (world.IMAGE_SIZE, world.IMAGE_SIZE), (128, 128, 128))
    blank_texts = evaluate.ask(chat, conv, [blank], [evaluate.DESCRIBE], DESCRIPTION_TOKENS) * count
    wrong_texts = texts[1:] + texts[:1]  # the description of another image
    probe = evaluate.linear_probe(chat, {"held_out": held_out, "left_out": left_out})

    # after stage 1, and with an untrained projection
    load_projection(chat.model, checkpoints["stage1"])
    first_texts, first_answers = describe(chat, conv, few), ask_questions(chat, conv, few)
    torch.manual_seed(0)
    chat.model.llama_proj.reset_parameters()
    untrained_texts = describe(chat, conv, few)
    load_projection(chat.model, checkpoints["stage2"])

    controls = {
        "wrong_picture": wrong_texts,
        "blank_picture": blank_texts,
        "untrained_projection": untrained_texts,
    }
    pairs = zip(first_texts[:5], texts, strict=False)
    report = {
        "pictures": {
            "held_out": count,
            "left_out": len(left_out),
            "after_stage1": len(few),
            "untrained_projection": len(few),
        },
        "held_out": held_out_score,
        "left_out": evaluate.score(left_out, left_texts),
        "left_out_pairs": evaluate.score_left_out(left_out, left_texts),
        "questions": questions_score,
        "linear_probe": probe,
        "after_stage1": evaluate.score(few, first_texts),
        "questions_after_stage1": evaluate.score_questions(few, first_answers),
        "best_constant": evaluate.best_constant(held_out),
        **{name: evaluate.score(held_out[: len(each)], each) for name, each in controls.items()},
        "above_chance": {
            name: evaluate.above_chance(held_out[: len(each)], each)
            for name, each in controls.items()
        },
        "style": {"stage1": evaluate.style(first_texts), "stage2": evaluate.style(texts)},
        "stages_side_by_side": [{"stage1": first, "stage2": second} for first, second in pairs],
        "example": {
            "question": held_out[0].question.text,
            "answer": answers[0],
            "description": texts[0],
        },
    }
    return report, list(map(record, held_out, texts, answers))


def run_drawn_benchmarks(
    chat: Chat, conv: Conversation, checkpoint: Path, count: int, output: Path
) -> tuple[Path, Path]:
    """Run drawn_world and drawn_questions on `count` images each with the loaded model; return their results.json."""
    benchmarks = {}
    for name in ("drawn_world", "drawn_questions"):
        benchmark = make_benchmark(name, {"num_images": count})
        benchmarks[name] = OpenBenchmark(benchmark, benchmark.checked_items())

    def answer(items: Sequence[BenchmarkItem], cfg: DrawnConfig) -> Iterator[dict]:
        settings = {
            "batch_size": cfg.batch_size,
            "temperature": 0,
            "max_new_tokens": cfg.max_new_tokens,
        }
        return answering.answers(chat, conv, items, **settings)

    weights = {checkpoint.name: file_sha256(checkpoint)}
    paths = run_benchmarks(
        benchmarks, output, answer, Asked(settings=weights, details={"weights": weights})
    )
    return paths["drawn_world"], paths["drawn_questions"]


def read_benchmark(path: Path) -> tuple[dict[str, float], list[str]]:
    """Return {metric: value} rounded to four digits, and the answers, of a results.json.

    The accuracies of questions are named by kind, the one over all questions "all".
    """
    content = read_results(path)
    figures = {}
    for name, metric in content["metrics"].items():
        short = "all" if name == "accuracy" else name.removesuffix("/accuracy")
        figures[short] = round(metric["value"], 4)
    return figures, [record["answer"] for record in content["items"]]


def describe(chat: Chat, conv: Conversation, tests: list[Test]) -> list[str]:
    """Return the answers to "Describe this image in detail.", one for each test."""
    images = [test.image for test in tests]
    return evaluate.ask(chat, conv, images, [evaluate.DESCRIBE] * len(tests), DESCRIPTION_TOKENS)


def ask_questions(chat: Chat, conv: Conversation, tests: list[Test]) -> list[str]:
    """Return the answer to each test's question."""
    images, questions = [test.image for test in tests], [test.question.text for test in tests]
    return evaluate.ask(chat, conv, images, questions, QUESTION_TOKENS)


def load_projection(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of `checkpoint` into `model`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    model.load_trainable(state, "quickstart", path=checkpoint)


def record(test: Test, description: str, answer: str) -> dict:
    """Return one line of answers.jsonl, with the image as base64 JPEG."""
    buffer = io.BytesIO()
    test.image.save(buffer, "JPEG", quality=95)
    marks = evaluate.marks(test.scene, description)
    return {
        "description": description,
        "is_right": marks["exact"][0],
        "wrong": [name for name in evaluate.ATTRIBUTES if not all(marks[name])],
        "question": test.question.text,
        "expected": test.question.answer,
        "answer": answer,
        "answer_is_right": test.question.is_answered_by(answer),
        "picture": base64.b64encode(buffer.getvalue()).decode(),
    }
