"""The page in a real browser, on the real program with a small model.

Needs Chromium (Debian: apt-get install chromium); skipped without it.
"""

import re
import shutil

import pytest
from PIL import Image

from minigpt4.quickstart import world

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# by a script in the page, for the small model is faster than a remote-controlled mouse
STOP_SOON = """() => new Promise(done => {
    const watch = setInterval(() => {
        const stop = document.querySelector(".stop-button")
        const answer = [...document.querySelectorAll("[data-testid=bot]")].at(-1)
        if (stop && answer && answer.innerText.length > 5) { clearInterval(watch); stop.click(); done() }
    }, 5)
})"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
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

    def visit():
        contexts.append(chromium.new_context(viewport={"width": 1280, "height": 900}))
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
        if not self.page.get_by_label("Seed").is_visible():
            self.page.get_by_text("Settings").click()
        field = self.page.get_by_role("spinbutton", name=re.compile(label))

        def holds():
            field.fill(str(value))
            field.blur()
            self.page.wait_for_timeout(200)
            return float(field.input_value()) == value

        self.wait_for(holds)  # gradio writes the defaults a moment after the panel opens, over what a script has typed

    def give(self, path):
        self.page.set_input_files("input[type=file]", path)
        self.page.locator(".thumbnails .thumbnail-item, .thumbnail-image").first.wait_for()

    def ask(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def wait(self):
        """Wait until the answer is complete; return the dialogue."""
        self.page.get_by_role("button", name="Submit").last.wait_for(timeout=30_000)
        return self.dialogue()

    def dialogue(self):
        """Return the texts of questions and answers."""
        return [text for text in self.page.locator("[data-testid=user], [data-testid=bot]").all_inner_texts() if text]

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
    assert whole[0] == "what is this?" and whole[1].startswith(partial) and len(whole[1]) > len(partial) + 50

    person.setting("Longest answer", 1000)  # some 2,500 letters
    person.page.get_by_role("button", name="Retry").last.click()
    person.page.evaluate(STOP_SOON)
    stopped = person.wait()
    shorter, longer = sorted([stopped[1], whole[1]], key=len)
    assert len(stopped) == 2 and 0 < len(stopped[1]) < 1500 and longer.startswith(shorter)
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
    assert [url for url in person.requests if not url.startswith((person.url, "data:", "blob:"))] == []


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


def test_a_refusal_is_said_and_the_message_comes_back(visit, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    person = visit()
    person.give(str(tmp_path / "bad.png"))
    person.ask("what is this?")
    person.page.get_by_text("image 'bad.png'").first.wait_for()
    person.wait()
    assert person.dialogue() == [] and person.box.input_value() == "what is this?"


def test_an_example_is_answered(visit):
    person = visit()
    person.setting("Longest answer", 5)
    person.page.locator(".example").nth(1).click()
    person.wait_for(lambda: len(person.dialogue()) == 2)
    assert person.wait()[0] == "What is in this image?"
