"""The HTML of a dialogue: no tag works that users or models write."""

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.serving.session import Turn
from minigpt4.serving.shown import as_markdown, as_typed, messages

HARMLESS = {"div", "p", "br", "hr", "strong", "em", "code", "pre", "blockquote", "ul", "ol", "li"}
HARMLESS |= {f"h{level}" for level in range(1, 7)} | {"table", "thead", "tbody", "tr", "th", "td"}
PIECES = [
    "<img src=x>",
    "<b",
    ">",
    "![a](http://e/x)",
    "[a]: http://e",
    "[a]",
    "`",
    "```",
    "|",
    "|-|",
    "\n",
    "\\",
    "&lt;",
]
PIECES += [
    "&#60;",
    "<!--",
    "<![CDATA[",
    "<?x",
    "<http://e>",
    "javascript:x",
    "* ",
    "1. ",
    "#",
    "~",
    "    ",
    '"',
    "'",
    "\0",
]


def tags_of(html):
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.handle_decl = parser.handle_pi = parser.unknown_decl = parser.handle_comment = (
        found.append
    )
    parser.feed(html)
    parser.close()
    return found


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_no_text_makes_a_tag_that_loads_or_runs(text):
    assert tags_of(as_typed(text)) == []
    for tag, attributes in tags_of(as_markdown(text)):
        assert tag in HARMLESS, text
        assert set(attributes) <= {"class", "start", "style"}, text
        assert "url" not in attributes.get("style", "") and "&" not in attributes.get("style", "")


def test_what_is_said_about_an_answer():
    turns = [Turn("one"), Turn("two", is_stopped=True, answer="so far"), Turn("three")]
    shown = [(message["role"], message["content"]) for message in messages(turns, "2 ahead of you")]
    assert shown[1] == ("assistant", "…") and shown[5] == (
        "assistant",
        '<p class="note">2 ahead of you</p>',
    )
    assert "so far" in shown[3][1] and shown[3][1].endswith('<p class="note">stopped</p>')
    assert len(messages(turns)) == 5


def test_images_that_are_gone_are_left_out(tmp_path):
    (tmp_path / "here.png").write_bytes(b"x")
    turn = Turn("two images", (str(tmp_path / "here.png"), str(tmp_path / "gone.png")))
    assert messages([turn])[0]["content"] == [{"path": str(tmp_path / "here.png")}, "two images"]
