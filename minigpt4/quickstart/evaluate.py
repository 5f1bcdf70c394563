"""What a trained model says about images that it has never seen, and how much of it is right."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from minigpt4.quickstart import reading, world
from minigpt4.quickstart.questions import Question, draw_question
from minigpt4.quickstart.vision import QUERIES, VOCABULARY, answers

DESCRIBE = "Describe this image in detail."
OBJECT_ATTRIBUTES = {"shape": "shape", "colour": "colour", "size": "size", "position": "cell"}  # their fields
MIN_SAID = 20  # a share of fewer has a standard error above 0.1
ATTRIBUTES = (*OBJECT_ATTRIBUTES, "background", "count")


@dataclass
class Test:
    """An image of an evaluation split and one question about it."""

    scene: world.Scene
    image: Image.Image
    question: Question


def draw_tests(split: str, count: int) -> list[Test]:
    """The first `count` images of an evaluation split; the kinds of questions take turns."""
    tests = []
    for index in range(count):
        scene, image, _ = world.picture(split, index)
        tests.append(Test(scene, Image.fromarray(image), draw_question(scene, index)))
    return tests


def ask(chat, conv, embeds: list, prompts: list[str], max_new_tokens: int, batch_size: int = 100) -> list[str]:
    """Greedy answers of the chat engine, one for each (image embedding, prompt)."""
    texts = []
    for start in range(0, len(embeds), batch_size):
        batch = slice(start, start + batch_size)
        convs = [conv.copy() for _ in embeds[batch]]
        for one, prompt in zip(convs, prompts[batch], strict=True):
            one.append_image()
            chat.ask(prompt, one)
        images = [[embed] for embed in embeds[batch]]
        texts += [text for text, _ in chat.answer_batch(convs, images, temperature=0, max_new_tokens=max_new_tokens)]
    return texts


def encode(chat, images: list, batch_size: int = 50) -> list[torch.Tensor]:
    return [
        e for start in range(0, len(images), batch_size) for e in chat.encode_images(images[start : start + batch_size])
    ]


def marks(scene: world.Scene, text: str) -> dict[str, list[bool]]:
    """What a description gets right, per attribute; objects are compared in order, one not mentioned is wrong."""
    said = reading.read(text)
    result = {"background": [said.background == scene.background], "count": [said.count == len(scene.objects)]}
    mentions = [*said.objects, *[None] * len(scene.objects)]
    for attribute, name in OBJECT_ATTRIBUTES.items():
        pairs = zip(scene.objects, mentions, strict=False)
        result[attribute] = [m is not None and getattr(m, name) == getattr(o, name) for o, m in pairs]
    whole = all(all(values) for values in result.values()) and len(said.objects) == len(scene.objects)
    return {**result, "exact": [whole]}


def score(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Accuracy per attribute, of descriptions; an object that is not named is wrong in everything."""
    rows = [marks(test.scene, text) for test, text in zip(tests, texts, strict=True)]
    return {name: round(float(np.mean([v for row in rows for v in row[name]])), 4) for name in (*ATTRIBUTES, "exact")}


def above_chance(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Accuracy minus that of the best constant answer, per attribute, over what a control says at all.

    A control that names fewer objects than there are would otherwise seem to be worse than chance. An attribute of
    which it speaks fewer than MIN_SAID times is left out.
    """
    constant, right = best_constant(tests), {}
    for test, text in zip(tests, texts, strict=True):
        said = reading.read(text)
        named = {name: len(said.objects) for name in OBJECT_ATTRIBUTES}
        named |= {"background": said.background is not None, "count": said.count is not None}
        for name, values in marks(test.scene, text).items():
            right.setdefault(name, []).extend(values[: named.get(name, 0)])
    return {
        name: round(float(np.mean(values)) - constant[name], 4)
        for name, values in right.items()
        if len(values) >= MIN_SAID
    }


def score_left_out(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Shape and colour accuracy over the objects whose colour-shape pair was left out of all training."""
    right = {"shape": [], "colour": []}
    for test, text in zip(tests, texts, strict=True):
        found = marks(test.scene, text)
        for i, item in enumerate(test.scene.objects):
            if (item.colour, item.shape) in world.LEFT_OUT_PAIRS:
                for name in right:
                    right[name].append(found[name][i])
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def score_questions(tests: list[Test], texts: list[str]) -> dict[str, float]:
    """Share of right answers, for each kind of question and over all."""
    by_kind: dict[str, list[bool]] = {"all": []}
    for test, text in zip(tests, texts, strict=True):
        is_right = test.question.is_answered_by(text)
        by_kind["all"].append(is_right)
        by_kind.setdefault(test.question.kind, []).append(is_right)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(by_kind.items())}


def best_constant(tests: list[Test]) -> dict[str, float]:
    """Accuracy per attribute of the best answer that does not depend on the image."""
    result = {}
    for attribute, name in OBJECT_ATTRIBUTES.items():
        values = [getattr(o, name) for test in tests for o in test.scene.objects]
        result[attribute] = _most_common_share(values)
    result["background"] = _most_common_share([test.scene.background for test in tests])
    result["count"] = _most_common_share([len(test.scene.objects) for test in tests])
    return result


def _most_common_share(values: list) -> float:
    return round(max(values.count(v) for v in set(values)) / len(values), 4)


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
def query_outputs(model, pixels: torch.Tensor) -> torch.Tensor:
    """The frozen Q-Former's outputs [B, Q, H], what `llama_proj` reads."""
    with model.maybe_autocast():
        image_embeds = model.ln_vision(model.visual_encoder(pixels.to(model.device)))
        return model.Qformer(model.query_tokens, image_embeds).float().cpu()


def linear_probe(chat, tests: dict[str, list[Test]], num_training: int = 1500) -> dict[str, dict[str, float]]:
    """Per set of tests, accuracy of linear classifiers on the query outputs, fitted on stage-1 images.

    It says what vision knows.
    """

    def features(scenes_and_images):
        pixels = torch.stack([chat.vis_processor(image) for _, image in scenes_and_images])
        outputs = torch.cat([query_outputs(chat.model, part) for part in pixels.split(100)])
        return outputs, torch.tensor([answers(scene) for scene, _ in scenes_and_images])

    drawn = (world.picture("stage1", index)[:2] for index in range(num_training))
    x, y = features([(scene, Image.fromarray(image)) for scene, image in drawn])
    unseen = {name: features([(test.scene, test.image) for test in group]) for name, group in tests.items()}
    right: dict[str, dict[str, list]] = {name: {} for name in tests}
    for i, (kind, _) in enumerate(QUERIES):
        probe = torch.nn.Linear(x.shape[-1], 1 + len(VOCABULARY[kind]))
        optimizer = torch.optim.Adam(probe.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(probe(x[:, i]), y[:, i]).backward()
            optimizer.step()
        for name, (x_test, y_test) in unseen.items():
            hits = probe(x_test[:, i]).argmax(-1) == y_test[:, i]
            right[name].setdefault({"cell": "position"}.get(kind, kind), []).append(hits[y_test[:, i] > 0])
    return {
        name: {kind: round(torch.cat(hits).float().mean().item(), 4) for kind, hits in kinds.items()}
        for name, kinds in right.items()
    }
