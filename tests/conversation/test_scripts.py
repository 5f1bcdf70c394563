"""Conversations that scripts build and change in place, as they did in 2023: the model sees what they wrote."""

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.conversation.chat import PrefixCache
from minigpt4.conversation.conversation import (
    CHATML,
    CONV_VISION,
    TEMPLATES,
    VICUNA_V0,
    VICUNA_V1,
    Conversation,
    SeparatorStyle,
)
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.segments import IMAGE
from minigpt4.text.templates import template_for
from tests.conversation.helpers import GREEDY, asked, computed

SLOT = "<Img><ImageHere></Img>"
NAMES = [template.roles[0] for template in TEMPLATES]
TEXT = st.text(max_size=30) | st.sampled_from(
    ["<ImageHere>", SLOT, "\ud83d", "###", "</s>", "{}", "<|im_end|>", ""]
)


def dialogue(template, question="What is it?", answer=None, then=None):
    """An image and a question, asked by the methods."""
    conv = Conversation(template)
    conv.append_image()
    conv.append_question(question)
    if answer is not None:
        conv.append_message(conv.roles[1], answer)
        conv.append_question(then)
    return conv


def own_ask(conv):  # with its own joining of image and question
    conv.append_message(conv.roles[0], SLOT)
    conv.messages[-1][1] = " ".join([conv.messages[-1][1], "What is it?"])


def own_rows(conv):
    conv.messages.append([conv.roles[0], f"{SLOT} What is it?"])


def own_list(conv):
    conv.messages = [[conv.roles[0], f"{SLOT} What is it?"]]


def own_tuple(conv):
    conv.messages = [(conv.roles[0], f"{SLOT} What is it?")]


def restored(conv):
    conv.messages = dialogue(conv.template).messages


def read_back(conv):
    conv.messages = json.loads(json.dumps(dialogue(conv.template).messages))


def unpickled(conv):
    conv.messages = pickle.loads(pickle.dumps(dialogue(conv.template).messages))


WAYS = [own_ask, own_rows, own_list, own_tuple, restored, read_back, unpickled]


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_question_written_into_the_list_is_asked(way, template, chat):
    conv, wanted = Conversation(template), dialogue(template)
    way(conv)
    assert conv.get_prompt() == wanted.get_prompt() and conv.num_images == 1
    assert chat.encoder.encode(conv.segments()) == chat.encoder.encode(wanted.segments())


@pytest.mark.parametrize("template", TEMPLATES, ids=NAMES)
def test_an_answer_written_into_the_list_is_remembered(template):
    """The loop of streaming servers: the answer is opened, written piece by piece, and the next question asked."""
    conv = dialogue(template)
    conv.append_message(conv.roles[1], None)
    conv.messages[-1][1] = "A "
    conv.messages[-1][1] += "circle."
    conv.append_message(conv.roles[0], "Which colour?")
    assert (
        conv.get_prompt()
        == dialogue(template, answer="A circle.", then="Which colour?").get_prompt()
    )
    del conv.messages[1:]
    assert conv.get_prompt() == dialogue(template).get_prompt()


def test_an_edit_reaches_the_llm_and_the_prefix_cache(chat, embeddings):
    cache = PrefixCache()
    conv, images = asked(chat, "what is it?", embeddings[:1])
    for edit in ("where is it?", "what is it?", "who is it?"):
        conv.messages[0][1] = f"{SLOT} {edit}"
        del conv.messages[1:]
        wanted = chat.answer(asked(chat, edit, images)[0], images, **GREEDY)[0]
        assert chat.answer(conv, images, cache=cache, **GREEDY)[0] == wanted
    conv.messages[1][1] = "a tree"  # another answer than it gave
    chat.ask("why?", conv)
    with computed(chat) as passes:
        found = chat.answer(conv.copy(), images, cache=cache, **GREEDY)[0]
    assert found == chat.answer(conv, images, **GREEDY)[0]
    assert passes[0][1] < chat.get_context_emb(conv, images).shape[1] - images[0].shape[1]


def test_typed_text_that_looks_like_an_image_is_text_until_a_script_makes_a_plain_string_of_it(
    chat, embeddings
):
    conv = dialogue(VICUNA_V0, f"a {SLOT} b")
    assert conv.num_images == 1 == copy.deepcopy(conv).num_images
    assert conv.messages[0][1] == f"{SLOT} a {SLOT} b"
    conv.messages[0][1] = str.__str__(f"{conv.messages[0][1]}")
    assert conv.num_images == 2
    with pytest.raises(ValueError, match=r"2 image slot\(s\), img_list 1"):
        chat.answer(conv, embeddings[:1], **GREEDY)
    conv.append_message(conv.roles[1], SLOT)  # a model may write it, too
    assert conv.num_images == 2


# system and separators


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (VICUNA_V0, "Be brief.###"),
        (VICUNA_V1, "Be brief. "),
        (CHATML, "<|im_start|>system\nBe brief.<|im_end|>\n"),
    ],
    ids=lambda value: getattr(value, "roles", ["" if isinstance(value, str) else value])[0],
)
def test_the_system_text_can_be_set(template, opening):
    conv, before = Conversation(template), Conversation(template).get_prompt()
    conv.system = "Be brief."
    assert conv.get_prompt() == opening and conv.system == "Be brief."
    conv.system = conv.system  # as it was read
    assert conv.get_prompt() == opening
    conv.system += " Be kind."
    assert conv.get_prompt() == opening.replace("brief.", "brief. Be kind.")
    assert Conversation(template).get_prompt() == before  # the shared template has not changed
    conv.system = ""
    assert conv.get_prompt() == {VICUNA_V0: "###", VICUNA_V1: " ", CHATML: ""}[template]


def test_a_conversation_described_as_in_2023():
    system = VICUNA_V0.system.removesuffix("###")
    rows = (
        ("Human", f"{SLOT} What is it?"),
        ("Assistant", "A dog."),
        ("Human", "Why?"),
        ("Assistant", None),
    )
    conv = Conversation(
        system=system,
        roles=("Human", "Assistant"),
        messages=rows,
        offset=2,
        sep_style=SeparatorStyle.SINGLE,
        sep="###",
    )
    wanted = dialogue(VICUNA_V0, answer="A dog.", then="Why?")
    wanted.append_message("Assistant", None)
    assert (conv.get_prompt(), conv.num_images) == (wanted.get_prompt(), 1)
    assert (conv.sep, conv.sep_style, conv.offset) == ("###", SeparatorStyle.SINGLE, 2)
    assert conv.template.is_like(VICUNA_V0) and conv.template.stop == VICUNA_V0.stop
    assert conv.to_gradio_chatbot() == [["Why?", None]]
    assert conv.dict()["messages"] == [list(row) for row in rows]
    conv.append_message("Human", "kept")  # the caller's own rows are not changed
    assert len(rows) == 4


def test_two_separators_and_roles_that_bring_their_own_punctuation():
    two = Conversation("A chat.", ("USER", "ASSISTANT"), [], 0, SeparatorStyle.TWO, " ", "</s>")
    for role, text in ((0, "Hello"), (1, "Hi"), (0, "What?"), (1, None)):
        two.append_message(two.roles[role], text)
    assert two.get_prompt() == "A chat. USER: Hello ASSISTANT: Hi</s>USER: What? ASSISTANT:"
    assert two.template.is_like(VICUNA_V1) and two.sep_style is SeparatorStyle.TWO
    newest = Conversation(
        "S", ("<s>[INST] ", " [/INST] "), [["<s>[INST] ", "a"], [" [/INST] ", None]], sep=""
    )
    assert newest.get_prompt() == "S<s>[INST] a [/INST] "


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([["Human"]], r"messages\[0\]: \['Human'\]; expected \[role, text\]"),
        ([["Human", "a"], "lost"], r"messages\[1\]: 'lost'; expected"),
        ([["System", "a"]], "the role one of"),
        ([["Human", 7]], "messages.0.: a int; expected its text"),
        (
            [["Human", None], ["Assistant", None]],
            r"messages\[0\]\[1\] was never written; set it to a text",
        ),
        (
            [["Human", "a"], ["Assistant", None], ["Human", "b"]],
            r"messages\[1\]\[1\] was never written",
        ),
    ],
)
def test_what_cannot_be_a_message_is_said_at_once(rows, says):
    conv = CONV_VISION.copy()
    conv.messages = rows
    with pytest.raises(ValueError, match=says):
        conv.get_prompt()
    assert conv.copy().messages == rows


def test_what_cannot_be_set_says_what_to_write():
    conv = CONV_VISION.copy()
    for name in ("roles", "sep", "sep2", "sep_style", "turns", "sytem"):
        with pytest.raises(
            AttributeError,
            match=rf"conversation\.{name} .* write Conversation\(system=\.\., roles=",
        ):
            setattr(conv, name, "x")
    for roles, sep in ((("A", "A"), "#"), (("A",), "#"), (("A", 3), "#"), (("A", "B"), None)):
        with pytest.raises(ValueError, match="expected texts, and two different roles"):
            Conversation("S", roles, sep=sep)


def test_a_conversation_is_restored_from_its_plain_values():
    conv = dialogue(VICUNA_V0, answer="A dog.", then="Why?")
    conv.conv_id, conv.skip_next = "7", True
    again = Conversation(**json.loads(json.dumps(conv.dict())))
    assert again.get_prompt() == conv.get_prompt() and (again.num_images, again.conv_id) == (1, "7")
    assert conv.copy().skip_next and conv.system + conv.sep == VICUNA_V0.system


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda conv: setattr(conv, "messages", None), "messages: a NoneType; expected a list of"),
        (
            lambda conv: setattr(conv, "messages", (["Human", "a"],)),
            "messages: a tuple; expected a list of",
        ),
        (lambda conv: setattr(conv, "system", None), "system: a NoneType; expected text"),
        (
            lambda conv: conv.append_message("Human", ("a", "image")),
            "a message of tuple; expected its text",
        ),
    ],
)
def test_what_would_go_wrong_later_is_said_at_once(change, says):
    with pytest.raises(ValueError, match=says):
        change(CONV_VISION.copy())


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXT, min_size=9, max_size=9), is_two=st.booleans(), images=st.integers(0, 2))
def test_no_text_makes_an_image_or_a_traceback(chatml_tokenizer, texts, is_two, images):
    """Any system, roles, separators, questions and answers; and any format of a training configuration."""
    system, user, assistant, sep, sep2, question, answer, before, end_sym = texts
    style = SeparatorStyle.TWO if is_two else SeparatorStyle.SINGLE
    convs = [Conversation(template_for(f"{before}{{}}{assistant}", end_sym))]
    if user != assistant:
        convs.append(Conversation(system, (user, assistant), sep_style=style, sep=sep, sep2=sep2))
    for conv in convs:
        conv.system = system
        for _ in range(images):
            conv.append_image()
        conv.append_question(question)
        conv.append_message(conv.roles[1], answer)
        conv.append_question(question)
        conv.append_message(conv.roles[1], None)
        for each in (conv, conv.copy(), copy.deepcopy(conv), conv.without_oldest(1)):
            pieces = PromptEncoder(chatml_tokenizer).encode(each.segments())
            assert pieces.count(IMAGE) == images == each.num_images
            assert all(isinstance(piece, list) for piece in pieces if piece is not IMAGE)
