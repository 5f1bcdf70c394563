"""The page of a MiniGPT-v2 in a real browser: tasks, a box drawn on an image, boxes in questions and answers."""

import sys

import pytest

from tests.serving.server import Server
from tests.serving.small_v2 import GROUNDED, write_small_v2
from tests.serving.test_browser import chromium, images, visit  # noqa: F401
from tests.small_release import SmallRelease

pytestmark = pytest.mark.browser

QUESTION = "[identify] what is this {<20><30><60><70>}"


class V2Server(Server):
    def command(self, release, *arguments):
        return [
            sys.executable,
            "demo.py",
            "--cfg-path",
            "eval_configs/minigptv2_eval.yaml",
            *arguments,
        ]


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("small_v2")
    server = V2Server(SmallRelease(root), root / "log.txt", *write_small_v2(root))
    yield server
    server.close()


def drag(person, begin, *path, touch=False):
    """Draw on the image of the dialog, from and to shares of its width and height."""
    frame = person.page.locator("#draw-box div")
    person.wait_for(lambda: frame.bounding_box()["height"] > 100)
    edge = frame.bounding_box()
    points = [
        (edge["x"] + x * edge["width"], edge["y"] + y * edge["height"]) for x, y in (begin, *path)
    ]
    if touch:
        finger = person.page.context.new_cdp_session(person.page)
        for number, (x, y) in enumerate(points):
            kind = "touchMove" if number else "touchStart"
            finger.send(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            )
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    else:
        person.page.mouse.move(*points[0])
        person.page.mouse.down()
        for point in points[1:]:
            person.page.mouse.move(*point)
        person.page.mouse.up()


def press(person, name):
    person.page.get_by_role("button", name=name, exact=True).click()


def pictures(person, role):
    """Return the widths in pixels of the images with boxes in the messages of a role, once they are loaded."""
    shown = person.page.locator(f"#chat [data-testid={role}] img[src^='data:']")
    return shown.evaluate_all("all => all.map(one => one.naturalWidth)")


def words(person):
    """Return the parts of the dialogue that have words."""
    return [part for part in person.dialogue() if part.strip()]


def test_boxes_in_questions_and_answers(visit, images):  # noqa: F811
    person = visit(permissions=["clipboard-read", "clipboard-write"])
    person.setting("Temperature", 0)
    # the default of this model
    assert person.page.get_by_role("spinbutton", name="Repetition penalty").input_value() == "1.05"
    press(person, "draw a box")
    person.page.get_by_text("Add an image first.").wait_for()
    press(person, "Cancel")
    # one task takes the place of another; the words of the answer have colours, its boxes are drawn
    person.give(images[0])
    for name in ("vqa", "grounding"):
        press(person, name)
    person.wait_for(lambda: person.box.input_value() == "[grounding] describe this image in detail")
    person.box.press("Enter")
    person.wait_for(lambda: pictures(person, "bot") == [640])
    answer = person.wait()[1]
    assert answer.splitlines()[0] == "a red circle near stars"
    assert answer.splitlines()[-1] == "reaches beyond the image: {<70><60><104><90>}"
    colours = person.page.locator(".phrase").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert colours == ["rgb(198, 40, 40)", "rgb(21, 101, 192)"]
    press(person, "Copy conversation")  # what the model wrote, identifiers included
    person.wait_for(lambda: GROUNDED in person.page.evaluate("navigator.clipboard.readText()"))
    # a second turn about the same image
    press(person, "refer")
    person.wait_for(lambda: person.box.input_value() == "[refer] ")
    person.ask("[refer] stars")
    person.wait_for(lambda: pictures(person, "bot") == [640, 640])
    assert person.wait()[3] == "{<50><20><60><30>}"
    # a question with a box that is drawn
    person = visit()
    person.setting("Temperature", 0)
    person.give(images[0])
    press(person, "identify")
    drag(person, (0.605, 0.305), (0.4, 0.5), (0.205, 0.705))  # from the right to the left
    press(person, "Use it")
    person.wait_for(lambda: person.box.input_value() == QUESTION)
    person.box.press("Enter")
    person.wait_for(lambda: words(person) == [QUESTION, "a circle"])
    before = person.wait()  # the picture is a part of its own, without words
    assert pictures(person, "user") == [640]
    assert [one.is_visible() for one in person.page.locator("#chat .component img").all()].count(
        True
    ) == 1
    person.page.reload()
    person.wait_for(lambda: person.dialogue() == before and pictures(person, "user") == [640])
    assert [
        url for url in person.requests if not url.startswith((person.url, "data:", "blob:"))
    ] == []


def test_a_box_is_drawn_with_a_finger_and_drawn_again(visit, images):  # noqa: F811
    person = visit(390, has_touch=True)
    person.give(images[0])
    person.box.fill("[vqa] what is it?")
    for begin, end, box in [
        ((0.105, 0.205), (0.505, 0.905), "10><20><50><90"),
        ((0, 0), (0.305, 1.2), "0><0><30><100"),
    ]:
        press(person, "draw a box")
        drag(person, begin, end, touch=True)
        press(person, "Use it")
        person.wait_for(
            lambda box=box: person.box.input_value() == f"[vqa] what is it? {{<{box}>}}"
        )
    assert person.page.evaluate("document.documentElement.scrollWidth") <= 390
