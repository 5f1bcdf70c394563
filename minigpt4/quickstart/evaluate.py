"""What a trained model says about images that it has never seen, and how much of it is right."""

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
# their fields
OBJECT_ATTRIBUTES = {"shape": "shape", "colour": "colour", "size": "size", "position": "cell"}
MIN_SAID = 20  # a share of fewer has a standard error above 0.1
ATTRIBUTES = (*OBJECT_ATTRIBUTES, "background", "count")


@dataclass
class Test:
    """An image of an evaluation split and one question about it."""

    scene: world.Scene
    image: Image.Image
    question: Question


def draw_scenes(split: str, count: int) -> Iterator[tuple[world.Scene, Image.Image]]:
    """The first `count` scenes of a split and their images."""
    for index in range(count):
        scene, image = world.draw(split, index)[:2]
        yield scene, Image.fromarray(image)


def draw_tests(split: str, count: int) -> list[Test]:
    """The first `count` images of an evaluation split; the kinds of questions take turns."""
    drawn = enumerate(draw_scenes(split, count))
    return [Test(scene, image, draw_question(scene, index)) for index, (scene, image) in drawn]


def ask(
    chat: Chat,
    conv: Conversation,
    images: list[Image.Image],
    questions: list[str],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers of the chat engine, one for each image and the question about it."""
    pairs = enumerate(zip(images, questions, strict=True))
    items = [answering.Item(str(number), (image,), question) for number, (image, question) in pairs]
    settings = {"batch_size": 100, "temperature": 0, "max_new_tokens": max_new_tokens}
    return [line["answer"] for line in answering.answers(chat, conv, items, **settings)]


def marks(scene: world.Scene, text: str) -> dict[str, list[bool]]:
    """What a description gets right, per attribute, objects in order; one not mentioned is wrong."""
    said = parse(text)
    result = {"background": [said.background == scene.background]}
    result["count"] = [said.count == len(scene.objects)]
    mentions = [*said.objects, *[None] * len(scene.objects)]
    for attribute, name in OBJECT_ATTRIBUTES.items():
        pairs = zip(scene.objects, mentions, strict=False)
        result[attribute] = [
            m is not None and getattr(m, name) == getattr(o, name) for o, m in pairs
        ]
    whole = all(map(all, result.values())) and len(said.objects) == len(scene.objects)
    return {**result, "exact": [whole]}


def score(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Accuracy per attribute, of descriptions; an object not named is wrong in everything."""
    right: dict[str, list[bool]] = {name: [] for name in (*ATTRIBUTES, "exact")}
    for test, text in zip(tests, texts, strict=True):
        for name, values in marks(test.scene, text).items():
            right[name] += values
    return {name: share(values) for name, values in right.items()}


def share(values: list[bool]) -> float:
    """The share of true ones, to four digits."""
    return round(float(np.mean(values)), 4)


def above_chance(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Accuracy minus that of the best constant answer, per attribute, over what a control says.

    A control that names fewer objects than there are would otherwise seem to be worse than chance.
    An attribute of which it speaks fewer than MIN_SAID times is left out.
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
    """Shape and colour accuracy over the objects whose colour-shape pair no training shows."""
    right = {"shape": [], "colour": []}
    for test, text in zip(tests, texts, strict=True):
        marked = marks(test.scene, text)
        for number, item in enumerate(test.scene.objects):
            if (item.colour, item.shape) in world.LEFT_OUT_PAIRS:
                for name, values in right.items():
                    values.append(marked[name][number])
    return {name: share(values) for name, values in right.items()}


def score_questions(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Share of right answers, for each kind of question and over all."""
    by_kind: dict[str, list[bool]] = {"all": []}
    for test, text in zip(tests, texts, strict=True):
        is_right = test.question.is_answered_by(text)
        by_kind["all"].append(is_right)
        by_kind.setdefault(test.question.kind, []).append(is_right)
    return {kind: share(values) for kind, values in sorted(by_kind.items())}


def best_constant(tests: list[Test]) -> dict[str, float]:
    """Accuracy per attribute of the best answer that does not depend on the image."""
    scenes = [test.scene for test in tests]
    objects = list(chain.from_iterable(scene.objects for scene in scenes))
    truth = {kind: map(attrgetter(name), objects) for kind, name in OBJECT_ATTRIBUTES.items()}
    truth |= {
        "background": map(attrgetter("background"), scenes),
        "count": (len(scene.objects) for scene in scenes),
    }
    return {name: _most_common_share(list(values)) for name, values in truth.items()}


def _most_common_share(values: list) -> float:
    return round(Counter(values).most_common(1)[0][1] / len(values), 4)


def style(texts: list[str]) -> dict[str, float]:
    """Mean words of an answer, share of answers that are whole sentences, share of repeated trigrams."""
    repeated = []
    for text in texts:
        words = text.lower().split()
        trigrams = list(zip(words, words[1:], words[2:], strict=False))
        repeated.append(1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0)
    whole = [bool(re.fullmatch(r"(?:[A-Z][^.!?]*[.!?]\s*)+", text.strip())) for text in texts]
    return {
        "words": round(float(np.mean([len(text.split()) for text in texts])), 1),
        "complete_sentences": round(float(np.mean(whole)), 4),
        "repetition": round(float(np.mean(repeated)), 4),
    }


@torch.no_grad()
def query_outputs(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The frozen Q-Former's outputs [B, Q, H], what `llama_proj` reads, for pixels [B, 3, S, S]."""
    with model.maybe_autocast():
        image_embeds = model.ln_vision(model.visual_encoder(pixels.to(model.device)))
        return model.Qformer(model.query_tokens, image_embeds).float().cpu()


def probe_data(
    chat: Chat, scenes_and_images: Iterable[tuple[world.Scene, Image.Image]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query outputs [B, Q, H] of images, and the right answers [B, Q] to what the queries are asked."""
    pixels, targets = [], []
    for scene, image in scenes_and_images:
        pixels.append(chat.vis_processor(image))
        targets.append(answers(scene))
    outputs = [query_outputs(chat.model, part) for part in torch.stack(pixels).split(100)]
    return torch.cat(outputs), torch.tensor(targets)


def linear_probe(
    chat: Chat, tests: dict[str, list[Test]], num_training: int = 1500
) -> dict[str, dict]:
    """What vision knows: for each set of tests {attribute: accuracy} of linear classifiers.

    They read the query outputs and are fitted on stage-1 images.
    """
    x, y = probe_data(chat, draw_scenes("stage1", num_training))
    unseen = {}
    for name, group in tests.items():
        unseen[name] = probe_data(chat, [(test.scene, test.image) for test in group])
    right: dict[str, dict] = {name: {} for name in tests}
    for i, (kind, _) in enumerate(QUERIES):
        probe = torch.nn.Linear(x.shape[-1], 1 + len(VOCABULARY[kind]))
        optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(probe(x[:, i]), y[:, i]).backward()
            optimizer.step()
        # of the images that have the object of which the query tells
        for name, (x_test, y_test) in unseen.items():
            hits = probe(x_test[:, i]).argmax(-1) == y_test[:, i]
            right[name].setdefault({"cell": "position"}.get(kind, kind), []).append(
                hits[y_test[:, i] > 0]
            )
    for kinds in right.values():
        for kind, hits in kinds.items():
            kinds[kind] = round(torch.cat(hits).float().mean().item(), 4)
    return right
