"""The page in a real browser, on the real program with a small model.

Needs Chromium (Debian: apt-get install chromium); skipped without it.
"""

import base64
import concurrent.futures
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from minigpt4.quickstart import world
from minigpt4.serving.shown import as_markdown
from tests.serving.server import Visitor

pytestmark = pytest.mark.browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# by a script in the page, for the small model is faster than a remote-controlled mouse
STOP_SOON = """() => new Promise(done => {
    const watch = setInterval(() => {
        const stop = document.querySelector(".stop-button")
        const answer = [...document.querySelectorAll("[data-testid=bot]")].at(-1)
        if (stop && answer && answer.innerText.length > 5) { clearInterval(watch); stop.click(); done() }
    }, 5)
})"""


# drops files on an element as a mouse does
DROP = """(element, files) => {
    const data = new DataTransfer()
    for (const [name, type, content] of files)
        data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name, {type}))
    for (const kind of ["dragover", "drop"])
        element.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}))
}"""
# whether something else lies over the middle of an element
IS_COVERED = """element => {
    const {x, y, width, height} = element.getBoundingClientRect()
    return !element.contains(document.elementFromPoint(x + width / 2, y + height / 2))
}"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the package playwright is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    """Return a function that opens the page in a session of its own."""
    contexts = []

    def visit(width=1280, **options):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **options))
        return Person(contexts[-1].new_page(), server.url)

    yield visit
    for context in contexts:
        context.close()


class Person:
    """Somebody at the page."""

    def __init__(self, page, url):
        self.page, self.url, self.requests = page, url, []
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        self.box = page.locator("textarea[data-testid=textbox]").last
        page.locator(".example").first.wait_for()

    def setting(self, label, value):
        field = self.page.get_by_role("spinbutton", name=re.compile(label))
        was_open = self.page.get_by_label("Seed").is_visible()
        if not was_open:
            self.page.get_by_text("Settings").click()

        def holds():
            field.fill(str(value))
            field.blur()
            # gradio writes the defaults a moment after the panel opens, over what a script has typed
            for _ in range(1 if was_open else 8):
                self.page.wait_for_timeout(200)
                if float(field.input_value()) != value:
                    return False
            return True

        self.wait_for(holds)

    def give(self, *paths):
        self.page.set_input_files("input[type=file]", paths)
        self.wait_for_thumbnails(len(paths))

    def wait_for_thumbnails(self, count):
        """Wait until so many images lie in the box."""
        self.page.locator("#box .thumbnail-item").nth(count - 1).wait_for()

    def ask(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def wait(self):
        """Wait until the answer is complete; return the dialogue."""
        self.page.get_by_role("button", name="Submit").last.wait_for(timeout=30_000)
        return self.dialogue()

    def dialogue(self):
        """Return the texts of questions and answers."""
        return [
            text
            for text in self.page.locator("[data-testid=user], [data-testid=bot]").all_inner_texts()
            if text
        ]

    def last(self):
        return (self.dialogue() or [""])[-1]

    def wait_for(self, condition, seconds=20):
        for _ in range(seconds * 20):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(self.dialogue())


@pytest.fixture
def images(tmp_path):
    paths = [str(tmp_path / f"held_out_{number}.png") for number in range(2)]
    for number, path in enumerate(paths):
        Image.fromarray(world.draw("held_out", number)[1]).save(path)
    return paths


def test_a_chat(visit, images):
    """Upload, ask, watch it stream, stop, retry, second turn, second image, edit, undo, clear; nothing from afar."""
    person = visit()
    person.setting("Temperature", 0)
    person.setting("Repetition penalty", 1.5)
    person.setting("Longest answer", 400)
    person.give(images[0])
    person.ask("what is this?")
    person.wait_for(lambda: len(person.dialogue()) == 2 and len(person.last()) > 5)
    partial = person.last()
    whole = person.wait()
    assert (
        whole[0] == "what is this?"
        and whole[1].startswith(partial)
        and len(whole[1]) > len(partial) + 50
    )

    person.setting("Longest answer", 1000)  # some 2,500 letters
    person.page.get_by_role("button", name="Retry").last.click()
    person.page.evaluate(STOP_SOON)
    stopped = person.wait()
    partial, mark = stopped[1].rsplit("\n", 1)
    shorter, longer = sorted([partial.strip(), whole[1]], key=len)
    assert (
        len(stopped) == 2
        and 0 < len(shorter) < 1500
        and longer.startswith(shorter)
        and mark == "stopped"
    )
    person.page.wait_for_timeout(300)
    assert person.dialogue() == stopped  # it has really ended

    person.setting("Longest answer", 400)
    person.page.get_by_role("button", name="Retry").last.click()
    person.page.locator(".stop-button").wait_for()
    assert person.wait() == whole

    person.setting("Longest answer", 12)
    person.ask("and the water?")
    person.wait_for(lambda: len(person.dialogue()) == 4)
    second = person.wait()
    assert second[:3] == [*whole, "and the water?"] and second[3]
    person.give(images[1])
    person.ask("and this?")
    person.wait_for(lambda: len(person.dialogue()) == 6)
    third = person.wait()
    assert third[:4] == second and third[5]
    assert person.page.locator("#chat .message img").count() == 2

    person.page.get_by_role("button", name="Undo").last.click()
    person.wait_for(lambda: person.dialogue() == second)
    assert person.box.input_value() == "and this?"
    person.page.get_by_role("button", name="Edit").nth(1).click()
    person.page.locator("#chat textarea").fill("and the wall?")
    person.page.locator("#chat").get_by_role("button", name="Submit").click()
    person.wait_for(lambda: len(person.dialogue()) == 4 and person.dialogue()[2] == "and the wall?")
    assert person.wait()[:2] == whole
    person.page.get_by_role("button", name="Clear").click()
    person.wait_for(lambda: not person.dialogue())
    assert [
        url for url in person.requests if not url.startswith((person.url, "data:", "blob:"))
    ] == []


def test_two_people_at_once_do_not_mix(visit, images):
    people = [visit(), visit()]
    for person, path in zip(people, images, strict=True):
        person.setting("Temperature", 0)
        person.setting("Longest answer", 60)
        person.give(path)
    for number, person in enumerate(people):
        person.ask(f"what is image {number}?")
    for number, person in enumerate(people):
        person.wait_for(lambda person=person: len(person.dialogue()) == 2)
        assert person.wait()[0] == f"what is image {number}?"
        assert person.page.locator("#chat .message img").count() == 1
    one, other = (person.dialogue() for person in people)
    assert one[1] != other[1]


def test_markup_in_messages_is_text_and_loads_nothing(visit):
    person = visit()
    person.setting("Longest answer", 5)
    text = (
        "<script>window.evil=1</script><img src=http://127.0.0.1:9/a.png onerror=window.evil=1>"
        "![](http://127.0.0.1:9/b.png) <Img> &lt; &amp;lt; R&D **a** $$x$$"
    )
    person.ask(text)
    person.wait_for(lambda: len(person.dialogue()) == 2)
    assert person.wait()[0] == text
    person.page.get_by_role("button", name="Edit").first.click()
    person.page.locator("#chat").get_by_role("button", name="Submit").click()  # unchanged
    person.wait_for(lambda: person.dialogue()[:1] == [text])
    person.wait()
    assert person.page.evaluate("window.evil") is None
    assert not [url for url in person.requests if ":9/" in url]


def test_a_refusal_is_said_beside_the_chat_and_the_message_comes_back(visit, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    person = visit()
    person.setting("Longest answer", 5)
    person.ask("hello")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    before = person.wait()
    person.give(str(tmp_path / "bad.png"))
    person.ask("what is this?")
    person.page.get_by_text("image 'bad.png'").first.wait_for()
    person.wait()
    assert person.dialogue() == before and person.box.input_value() == "what is this?"
    assert not person.page.locator("[data-testid=user]").first.evaluate(IS_COVERED)


def test_an_empty_message_does_nothing(visit):
    person = visit()
    person.setting("Longest answer", 5)
    person.ask("hello")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    before = person.wait()
    for text in ("", "  "):
        person.ask(text)
        person.page.wait_for_timeout(500)
        assert person.dialogue() == before and person.page.locator(".toast-body").count() == 0
        assert not person.page.locator("[data-testid=user]").first.evaluate(IS_COVERED)
    person.ask("and now?")
    person.wait_for(lambda: len(person.dialogue()) == 4)


def test_images_are_taken_wherever_they_are_dropped_and_shown_in_a_row(visit, images):
    person = visit()
    person.setting("Longest answer", 5)
    files = [
        [Path(path).name, "image/png", base64.b64encode(Path(path).read_bytes()).decode()]
        for path in images
    ]
    text = ["a.txt", "text/plain", ""]
    person.page.locator("#chat").evaluate(DROP, [files[0], text])
    person.wait_for_thumbnails(1)
    person.page.locator("#title").evaluate(DROP, [files[1]])
    person.wait_for_thumbnails(2)
    person.page.locator("#box textarea").evaluate(DROP, [files[0]])  # where gradio takes them
    person.wait_for_thumbnails(3)
    person.ask("what is this?")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    person.wait()
    shown = person.page.locator("#chat .message img")
    boxes = [shown.nth(number).bounding_box() for number in range(shown.count())]
    assert len(boxes) == 3 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert {round(box["y"]) for box in boxes} == {round(boxes[0]["y"])} and max(
        box["height"] for box in boxes
    ) <= 112


def test_a_refresh_keeps_the_conversation_and_another_tab_has_its_own(visit, images):
    person = visit()
    person.setting("Temperature", 0)
    person.setting("Longest answer", 8)
    person.give(*images)
    person.ask("what is this?")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    before = person.wait()
    person.page.reload()
    person.wait_for(lambda: person.dialogue() == before)
    pictures = person.page.locator("#chat .message img")
    person.wait_for(
        lambda: pictures.evaluate_all("all => all.map(one => one.naturalWidth > 0)") == [True, True]
    )
    tab = Person(person.page.context.new_page(), person.url)
    tab.page.wait_for_timeout(500)
    assert tab.dialogue() == []
    for label, value in {
        "Temperature": 0,
        "Repetition penalty": 1.5,
        "Longest answer": 1000,
    }.items():
        person.setting(label, value)
    person.page.get_by_role("button", name="Retry").last.click()
    person.wait_for(lambda: len(person.last()) > 100)
    person.page.reload()  # while it is written
    person.wait_for(lambda: person.last().endswith("stopped"))
    assert len(person.dialogue()) == 2 and "session" not in person.page.url
    person.ask("and now?")
    person.wait_for(lambda: len(person.dialogue()) == 4 and person.dialogue()[2] == "and now?")


def test_who_waits_is_told_how_many_are_before(visit, server):
    person = visit()
    person.setting("Longest answer", 5)
    long = {"max_new_tokens": 600, "num_beams": 4}
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        others = [pool.submit(Visitor(server).chat, "tell me everything", **long) for _ in range(5)]
        person.wait_for(lambda: any(other.running() for other in others))
        person.page.wait_for_timeout(700)
        person.ask("hello")
        person.wait_for(lambda: re.fullmatch(r"\d ahead of you", person.last()))
        person.page.locator(".stop-button").click()
        person.wait_for(lambda: person.box.input_value() == "hello" and not person.dialogue())
        person.page.wait_for_timeout(300)  # the button comes back a moment later
        person.box.press("Enter")
        person.wait_for(lambda: re.fullmatch(r"\d ahead of you", person.last()))
        person.page.reload()
        person.wait_for(lambda: person.box.input_value() == "hello" and not person.dialogue())
        person.setting("Longest answer", 5)
        person.box.press("Enter")
        person.wait_for(lambda: re.fullmatch(r"\d ahead of you", person.last()), 60)
    person.wait_for(lambda: "ahead of you" not in person.last() and len(person.dialogue()) == 2)


ANSWER = """# Heading
**bold** and `a < b` and <b>no tag</b> <img src=http://127.0.0.1:9/a.png onerror=window.evil=1>
![x](http://127.0.0.1:9/b.png) ![][1] [leads](http://127.0.0.1:9/c) <http://127.0.0.1:9/d> javascript:window.evil=1

1. first
2. second

| a | b |
|:--|--:|
| 1 | 2 |

```html
<script>window.evil = 1</script>
```
[1]: http://127.0.0.1:9/e.png
"""


def test_markdown_of_an_answer_is_shown_and_loads_nothing(visit):
    person = visit()
    person.setting("Longest answer", 5)
    person.ask("hello")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    person.wait()
    bubble = person.page.locator("[data-testid=bot] .chatbot").last
    bubble.evaluate("(element, html) => { element.innerHTML = html }", as_markdown(ANSWER))
    assert bubble.locator("h1, strong, code, li, td, pre").count() == 9
    assert bubble.locator("a, img, script, b").count() == 0
    text = bubble.inner_text()
    for literal in (
        "a < b",
        "<b>no tag</b>",
        "![x](http://127.0.0.1:9/b.png)",
        "[leads](http://127.0.0.1:9/c)",
    ):
        assert literal in text
    # were the Markdown wrong, the page's policy would still let nothing be loaded
    bubble.evaluate("element => { element.innerHTML = '<img src=http://127.0.0.1:9/f.png>' }")
    person.page.wait_for_timeout(300)
    assert person.page.evaluate("window.evil") is None
    assert bubble.locator("img").evaluate("image => image.naturalWidth") == 0
    assert not [
        request
        for request in person.requests
        if ":9/" in request and not request.endswith("/f.png")
    ]


def test_what_is_copied_is_text(visit):
    person = visit(permissions=["clipboard-read", "clipboard-write"])
    person.setting("Longest answer", 5)
    person.ask("a < b & <b>c</b>?")
    person.wait_for(lambda: len(person.dialogue()) == 2)
    answer = person.wait()[1]
    person.page.get_by_role("button", name="Copy message").last.click()
    person.wait_for(lambda: person.page.evaluate("navigator.clipboard.readText()") == answer)
    person.page.get_by_role("button", name="Copy conversation").click()
    whole = f"user: a < b & <b>c</b>?\n\nassistant: {answer}"
    person.wait_for(lambda: person.page.evaluate("navigator.clipboard.readText()").strip() == whole)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_layout(visit, width, scheme):
    """Edges can be seen, all examples are there, the settings of a row are side by side; nothing needs a scroll bar."""
    person = visit(width, color_scheme=scheme)
    examples = person.page.locator("#chat .example")

    def examples_fit():
        """Return whether all three are side by side within the chat, which takes until their images are loaded."""
        boxes = [examples.nth(number).bounding_box() for number in range(3)]
        chat = person.page.locator("#chat").bounding_box()
        right, bottom = chat["x"] + chat["width"], chat["y"] + chat["height"]
        inside = [
            box["x"] + box["width"] <= right and box["y"] + box["height"] <= bottom + 1
            for box in boxes
        ]
        return all(inside) and len({round(box["y"]) for box in boxes}) == 1

    person.wait_for(examples_fit)
    for selector in ("#chat", "#box", "#settings", "#chat .example"):
        style = "one => { const {borderTopWidth: w, borderTopColor: c} = getComputedStyle(one); return [w, c] }"
        border, colour = person.page.locator(selector).first.evaluate(style)
        brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert border == "1px" and (brightness < 225 if scheme == "light" else brightness > 30), (
            selector,
            colour,
        )
    person.page.get_by_text("Settings").click()
    numbers = person.page.locator("#settings [data-testid=number-input]")
    numbers.last.wait_for()
    rows = [round(numbers.nth(number).bounding_box()["y"]) for number in range(6)]
    per_row = 4 if width == 1280 else 2
    assert [rows.count(y) for y in dict.fromkeys(rows)] == (
        [4, 2] if per_row == 4 else [2, 2, 2]
    ), rows
    assert person.page.evaluate("document.documentElement.scrollWidth") <= width
    assert person.page.locator("#tasks").count() == 0  # it reads no boxes


def test_an_example_is_answered(visit):
    person = visit()
    person.setting("Longest answer", 5)
    person.page.locator(".example").nth(1).click()
    person.wait_for(lambda: len(person.dialogue()) == 2)
    assert person.wait()[0] == "What is in this image?"
