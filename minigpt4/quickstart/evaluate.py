"""Ask a trained model about held-out drawn images, and score its descriptions and answers."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter

import numpy as np
import torch
from PIL import Image

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.conversation import Conversation
from minigpt4.evaluation import answering
from minigpt4.quickstart import world
from minigpt4.quickstart.parser import parse
from minigpt4.quickstart.questions import Question, draw_question
from minigpt4.quickstart.vision import QUERIES, VOCABULARY, answers

DESCRIBE = "Describe this image in detail."
# attribute: the field of world.Object and parser.Mention that holds it
OBJECT_ATTRIBUTES = {"shape": "shape", "colour": "colour", "size": "size", "position": "cell"}
MIN_SAID = 20  # the accuracy over fewer has a standard error above 0.1
ATTRIBUTES = (*OBJECT_ATTRIBUTES, "background", "count")


@dataclass
class Test:
    """An image of an evaluation split and one question about it."""

    scene: world.Scene
    image: Image.Image
    question: Question


def draw_scenes(split: str, count: int) -> Iterator[tuple[world.Scene, Image.Image]]:
    """Yield the first `count` scenes of a split with their images."""
    for index in range(count):
        scene, image = world.draw(split, index)[:2]
        yield scene, Image.fromarray(image)


def draw_tests(split: str, count: int) -> list[Test]:
    """Return the first `count` images of an evaluation split, each with a question; the kinds of questions alternate."""
    drawn = enumerate(draw_scenes(split, count))
    return [Test(scene, image, draw_question(scene, index)) for index, (scene, image) in drawn]


def ask(
    chat: Chat,
    conv: Conversation,
    images: list[Image.Image],
    questions: list[str],
    max_new_tokens: int,
) -> list[str]:
    """Return the chat engine's greedy answers, one for each image and the question about it."""
    pairs = enumerate(zip(images, questions, strict=True))
    items = [answering.Item(str(number), (image,), question) for number, (image, question) in pairs]
    settings = {"batch_size": 100, "temperature": 0, "max_new_tokens": max_new_tokens}
    return [line["answer"] for line in answering.answers(chat, conv, items, **settings)]


def marks(scene: world.Scene, text: str) -> dict[str, list[bool]]:
    """Return {attribute: [whether a description is right about it]}, for object attributes one value per object.

    The k-th object mentioned is compared with the k-th of the scene; what is not mentioned is wrong. "exact": everything
    is right and no further object is mentioned.
    """
    said = parse(text)
    result = {"background": [said.background == scene.background]}
    result["count"] = [said.count == len(scene.objects)]
    mentions = [*said.objects, *[None] * len(scene.objects)]
    for attribute, field in OBJECT_ATTRIBUTES.items():
        pairs = zip(scene.objects, mentions, strict=False)
        result[attribute] = [
            m is not None and getattr(m, field) == getattr(o, field) for o, m in pairs
        ]
    is_exact = all(map(all, result.values())) and len(said.objects) == len(scene.objects)
    return {**result, "exact": [is_exact]}


def score(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Return the accuracy of descriptions per attribute; an object not mentioned is wrong in all of its attributes."""
    right: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "exact")}
    for test, text in zip(tests, texts, strict=True):
        for name, values in marks(test.scene, text).items():
            right[name] += values
    return {name: share(values) for name, values in right.items()}


def share(values: list[bool]) -> float:
    """Return the share of true values, rounded to four digits."""
    return round(float(np.mean(values)), 4)


def above_chance(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Return by how much the accuracy of a control's descriptions exceeds the best constant answer's, per attribute.

    Only what the control mentions counts: one that mentions too few objects would otherwise seem to be worse than
    chance. Attributes that it mentions fewer than MIN_SAID times are left out.
    """
    constant, right = best_constant(tests), {}
    for test, text in zip(tests, texts, strict=True):
        said = parse(text)
        num_said = dict.fromkeys(OBJECT_ATTRIBUTES, len(said.objects))
        num_said |= {"background": said.background is not None, "count": said.count is not None}
        for name, values in marks(test.scene, text).items():
            right.setdefault(name, []).extend(values[: num_said.get(name, 0)])
    margins = {}
    for name, values in right.items():
        if len(values) >= MIN_SAID:
            margins[name] = round(float(np.mean(values)) - constant[name], 4)
    return margins


def score_left_out(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Return shape and colour accuracy over the objects whose colour-shape pair training never shows."""
    right = {"shape": [], "colour": []}
    for test, text in zip(tests, texts, strict=True):
        marked = marks(test.scene, text)
        for number, item in enumerate(test.scene.objects):
            if (item.colour, item.shape) in world.LEFT_OUT_PAIRS:
                for name, values in right.items():
                    values.append(marked[name][number])
    return {name: share(values) for name, values in right.items()}


def score_questions(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Return the accuracy of answers for each kind of question, and over all questions as "all"."""
    by_kind: dict[str, list[bool]] = {"all": []}
    for test, text in zip(tests, texts, strict=True):
        is_right = test.question.is_answered_by(text)
        by_kind["all"].append(is_right)
        by_kind.setdefault(test.question.kind, []).append(is_right)
    return {kind: share(values) for kind, values in sorted(by_kind.items())}


def best_constant(tests: list[Test]) -> dict[str, float]:
    """Return the accuracy per attribute of the best constant answer, which does not depend on the image."""
    scenes = [test.scene for test in tests]
    objects = list(chain.from_iterable(scene.objects for scene in scenes))
    truth = {name: map(attrgetter(field), objects) for name, field in OBJECT_ATTRIBUTES.items()}
    truth |= {
        "background": map(attrgetter("background"), scenes),
        "count": (len(scene.objects) for scene in scenes),
    }
    return {name: _most_common_share(list(values)) for name, values in truth.items()}


def _most_common_share(values: list) -> float:
    return round(Counter(values).most_common(1)[0][1] / len(values), 4)


def style(texts: list[str]) -> dict[str, float]:
    """Return mean words per text, the share of texts made of whole sentences, and the mean share of repeated trigrams."""
    repeated = []
    for text in texts:
        words = text.lower().split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        repeated.append(1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0)
    complete = [bool(re.fullmatch(r"(?:[A-Z][^.!?]*[.!?]\s*)+", text.strip())) for text in texts]
    return {
        "words": round(float(np.mean([len(text.split()) for text in texts])), 1),
        "complete_sentences": round(float(np.mean(complete)), 4),
        "repetition": round(float(np.mean(repeated)), 4),
    }


@torch.no_grad()
def query_outputs(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Return the frozen Q-Former's outputs [B, Q, H], the input of `llama_proj`, for pixels [B, 3, S, S]."""
    with model.maybe_autocast():
        image_embeds = model.ln_vision(model.visual_encoder(pixels.to(model.device)))
        return model.Qformer(model.query_tokens, image_embeds).float().cpu()


def probe_data(
    chat: Chat, scenes_and_images: Iterable[tuple[world.Scene, Image.Image]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the query outputs [B, Q, H] of images, and the right answers [B, Q] to what each query is trained to tell."""
    pixels, targets = [], []
    for scene, image in scenes_and_images:
        pixels.append(chat.vis_processor(image))
        targets.append(answers(scene))
    outputs = [query_outputs(chat.model, part) for part in torch.stack(pixels).split(100)]
    return torch.cat(outputs), torch.tensor(targets)


def linear_probe(
    chat: Chat, tests: dict[str, list[Test]], num_training: int = 1500
) -> dict[str, dict]:
    """Return {set of tests: {attribute: accuracy}} of linear classifiers on the query outputs: what the vision part knows.

    Each query has a classifier of its own, fitted on images of stage 1.
    """
    x, y = probe_data(chat, draw_scenes("stage1", num_training))
    test_data = {}
    for name, group in tests.items():
        test_data[name] = probe_data(chat, [(test.scene, test.image) for test in group])
    hits_of: dict[str, dict] = {name: {} for name in tests}
    for i, (kind, _) in enumerate(QUERIES):
        probe = torch.nn.Linear(x.shape[-1], 1 + len(VOCABULARY[kind]))
        optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(probe(x[:, i]), y[:, i]).backward()
            optimizer.step()
        attribute = "position" if kind == "cell" else kind
        for name, (x_test, y_test) in test_data.items():
            hits = probe(x_test[:, i]).argmax(-1) == y_test[:, i]
            has_object = y_test[:, i] > 0  # else the query has nothing to tell
            hits_of[name].setdefault(attribute, []).append(hits[has_object])
    accuracies: dict[str, dict] = {name: {} for name in tests}
    for name, of_attributes in hits_of.items():
        for attribute, hits in of_attributes.items():
            accuracies[name][attribute] = round(torch.cat(hits).float().mean().item(), 4)
    return accuracies
