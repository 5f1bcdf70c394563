"""The drawn world: reproducible, and what is held out never occurs in training."""

import hashlib

import numpy as np
import pytest

from minigpt4.quickstart import language, world
from minigpt4.quickstart.evaluate import above_chance, best_constant, draw_tests, marks
from minigpt4.quickstart.questions import Question, questions


def scenes(split, count):
    return [world.sample_scene(split, world.generator(split, index)) for index in range(count)]


def test_images_follow_from_their_number():
    first, again = (world.draw("stage1", 7) for _ in range(2))
    assert first[0] == again[0] and np.array_equal(first[1], again[1])
    digest = hashlib.sha256("".join(map(repr, scenes("held_out", 50))).encode()).hexdigest()
    assert digest[:16] == "f673760e740afe44", (
        "the world changed: raise world.VERSION, pretrain again"
    )


@pytest.mark.parametrize("split", world.TRAIN_SPLITS)
def test_training_never_sees_what_is_held_out(split):
    for scene in scenes(split, 2000):
        assert not scene.has_left_out_pair()
        assert not scene.is_for_evaluation()


def test_evaluation_images_are_what_they_are_called():
    assert all(
        scene.is_for_evaluation() and not scene.has_left_out_pair()
        for scene in scenes("held_out", 300)
    )
    assert all(
        scene.is_for_evaluation() and scene.has_left_out_pair() for scene in scenes("left_out", 300)
    )


def test_each_colour_and_shape_misses_one_partner():
    colours, shapes = zip(*world.LEFT_OUT_PAIRS, strict=True)
    assert set(colours) == set(world.COLOURS) and set(shapes) == set(world.SHAPES)


def test_objects_are_drawn_in_their_cells():
    for index in range(100):
        scene, image, object_map = world.draw("stage2", index)
        for number, item in enumerate(scene.objects, 1):
            rows, columns = np.nonzero(object_map == number)
            third = image.shape[0] / 3
            assert (
                int(rows.mean() // third) == item.row
                and int(columns.mean() // third) == item.column
            )


@pytest.mark.parametrize("say", [language.describe])
def test_a_description_reads_back_as_its_scene(say):
    for split in ("stage2", "left_out"):
        for index, scene in enumerate(scenes(split, 1000)):
            text = say(scene, world.generator(split, index))
            assert all(all(values) for values in marks(scene, text).values()), text


def test_every_question_is_answered_by_its_sentence_which_is_a_fact():
    for scene in scenes("held_out", 300):
        facts = language.facts(scene)
        for question in questions(scene):
            assert question.is_answered_by(question.sentence), question
            assert question.sentence.rstrip(".").lower() in facts, question


def test_the_evaluation_asks_in_words_that_training_never_shows():
    rng = np.random.default_rng(0)
    for scene in scenes("held_out", 50):
        for question in questions(scene):
            assert question.text not in {question.taught(rng) for _ in range(20)}


def test_wrong_answers_are_wrong():
    scene = world.Scene(
        "grass",
        (
            world.Object("small", "red", "circle", "top"),
            world.Object("large", "blue", "star", "left"),
        ),
    )
    right = "The image shows two objects on green grass. A small red circle is at the top. "
    right += "A large blue star is on the left."
    assert marks(scene, right)["exact"] == [True]
    for old, new, attribute in (
        ("red", "green", "colour"),
        ("star", "ring", "shape"),
        ("large", "small", "size"),
        ("on the left", "on the right", "position"),
        ("two", "three", "count"),
        ("green grass", "a brick wall", "background"),
    ):
        found = marks(scene, right.replace(old, new))
        assert not all(found[attribute]) and found["exact"] == [False]
        assert all(all(found[name]) for name in found if name not in (attribute, "exact"))
    assert marks(scene, "")["shape"] == [False, False]
    asked = Question("colour", "circle", "red", "The circle is red.")
    assert asked.text == "What colour is the circle?"
    assert asked.is_answered_by("The circle is red.") and not asked.is_answered_by(
        "The circle is blue, not red."
    )


def test_controls_are_held_against_the_best_constant_answer():
    tests = draw_tests("held_out", 40)
    constant = best_constant(tests)
    perfect = [language.describe(test.scene, np.random.default_rng(0)) for test in tests]
    margins = above_chance(tests, perfect)
    assert margins == {name: pytest.approx(1 - share, abs=1e-4) for name, share in constant.items()}
    rotated = above_chance(tests, perfect[1:] + perfect[:1])
    assert max(rotated.values()) < 0.2 < min(margins.values())
    silent = above_chance(tests, ["Nothing to be seen."] * len(tests))
    assert silent == {}
