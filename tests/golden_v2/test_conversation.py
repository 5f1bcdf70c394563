"""Prompts, ids, greedy answers, stops and images of the newest release's chat (set d).

A Conversation made of the release's own strings gives its prompts token for token. The conversations that carry its
names here differ in two things, which training had otherwise: BOS once, and `</s>` behind an answer.
"""

import numpy as np
import pytest
import torch

from minigpt4.conversation.answer_text import AnswerText
from minigpt4.conversation.conversation import (
    Chat,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    StoppingCriteriaSub,
)
from minigpt4.processors import Blip2ImageEvalProcessor
from minigpt4.processors.images import ImageError
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.segments import IMAGE
from tests.golden_v2 import GOLDEN, needs, read
from tests.golden_v2.model import CONFIGS, V2, golden_model

pytestmark = needs("d_conversation")
HERE = "d_conversation"
EMBEDS, SCORES = 1e-5, 1e-4  # the fixtures' README
PROMPTS = read(f"{HERE}/prompts.json", {"templates": {}, "dialogues": []})
CHATS = read(f"{HERE}/chats.json")
SCORED = (
    np.load(GOLDEN / HERE / "scores.npz").files if (GOLDEN / HERE / "scores.npz").is_file() else []
)
OURS = {
    "vicuna0": CONV_VISION_Vicuna0,
    "llama2": CONV_VISION_LLama2,
    "minigptv2": CONV_VISION_minigptv2,
    "minigptv2_eval": CONV_VISION_minigptv2,
}
CLOSED = "</s><s>"  # behind an answer
CUT = "max_length"  # of the release cuts the image off, and BOS


def of_the_release(name):
    """Return the Conversation made of the release's strings."""
    if name not in PROMPTS["templates"]:
        pytest.skip(f"this set of fixtures has no template {name}")
    given = PROMPTS["templates"][name]
    return Conversation(
        given["system"], given["roles"], [], given["offset"], sep=given["sep"], sep2=given["sep2"]
    )


def is_faulty(dialogue):
    """The release takes a typed </Img> for an image, and glues what follows an empty message to it."""
    texts = [event[1] for event in dialogue["events"] if len(event) > 1]
    return "" in texts or any(text.endswith("</Img>") or "</s>" in text for text in texts)


PLAYED = {
    "image": lambda conv: conv.append_image(),
    "user": lambda conv, text: conv.append_question(text),
    "assistant": lambda conv, text: conv.append_message(conv.roles[1], text),
    "open": lambda conv: conv.append_message(conv.roles[1], None),
}


def played(conv, events):
    """Play the events of a dialogue; one with a kind of events that is not in PLAYED skips the test."""
    for kind, *what in events:
        handler(PLAYED, kind)(conv, *what)
    return conv


def handler(handlers, kind):
    """Return what plays a kind of event, or of template; skip the test if nothing here does."""
    if kind not in handlers:
        pytest.skip(f"{kind} is not known here, only {', '.join(handlers)}")
    return handlers[kind]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Return a function of a fixture's model name that gives its Chat, built once."""
    built = {}

    def chat(name):
        if name not in built:
            model = golden_model(name, tmp_path_factory.mktemp(name))
            built[name] = Chat(model, Blip2ImageEvalProcessor(model.image_size))
        return built[name]

    return chat


@pytest.fixture(scope="module")
def encoder():
    from minigpt4.models.llm.language_model import load_tokenizer

    return PromptEncoder(load_tokenizer(GOLDEN / "model/llama"))


SOUND = [dialogue for dialogue in PROMPTS["dialogues"] if not is_faulty(dialogue)]


@pytest.mark.parametrize("dialogue", SOUND, ids=lambda d: f"{d['template']}-{d['dialogue']}")
def test_prompts_and_ids(encoder, dialogue):
    conv = played(of_the_release(dialogue["template"]), dialogue["events"])
    assert conv.messages == dialogue["messages"]
    assert conv.get_prompt() == dialogue["prompt"]
    pieces = encoder.encode(conv.segments())
    assert [piece for piece in pieces if piece is not IMAGE] == dialogue["segment_ids"]
    assert conv.to_gradio_chatbot() == dialogue["gradio"] or len(dialogue["messages"]) % 2


@pytest.mark.parametrize("dialogue", SOUND, ids=lambda d: f"{d['template']}-{d['dialogue']}")
def test_our_prompts_have_one_bos_and_end_answers(encoder, dialogue):
    conv = played(handler(OURS, dialogue["template"]).copy(), dialogue["events"])
    expected = dialogue["prompt"]
    if dialogue["template"] != "vicuna0":
        pieces = expected.split("<s>")  # before the first, and one for each of the user's messages
        is_closed = [
            "[/INST]" in piece and not piece.endswith(conv.template.answer) for piece in pieces
        ]
        closings = [CLOSED if closed else "" for closed in is_closed]
        expected = "".join(piece + closing for piece, closing in zip(pieces, closings, strict=True))
    assert conv.get_prompt() == expected
    first = encoder.encode(conv.segments())[0]
    assert first[:2].count(encoder.bos[0]) == 1


@pytest.mark.parametrize(
    "dialogue", [d for d in PROMPTS["dialogues"] if is_faulty(d)], ids=lambda d: d["dialogue"]
)
def test_every_message_is_a_turn_of_its_own(dialogue):
    """With each typed character, and images only where there are any."""
    conv = played(of_the_release(dialogue["template"]), dialogue["events"])
    typed = [event[1] for event in dialogue["events"] if len(event) > 1]
    prompt = conv.get_prompt()
    assert all(text in prompt for text in typed)
    assert conv.num_images == sum(event[0] == "image" for event in dialogue["events"])
    assert len(conv.messages) == sum(event[0] != "image" for event in dialogue["events"])


@pytest.mark.parametrize("row", read(f"{HERE}/prepare_texts.json"), ids=lambda row: row["template"])
def test_questions_of_the_evaluation(row):
    for text, prompt in zip(row["texts"], row["prompts"], strict=True):
        conv = of_the_release(row["template"])
        conv.append_image()
        conv.append_question(text)
        conv.append_message(conv.roles[1], None)
        assert conv.get_prompt() == prompt


def start(chat, case):
    """Return (conversation, images) at the start of a case, and its Chat with the case's stops."""
    return of_the_release(case["template"]), Chat(
        chat.model, chat.vis_processor, None, [StoppingCriteriaSub(case["stops"])]
    )


def upload_encoded(chat, conv, images, path):
    """Encode an image by hand, before it is appended."""
    raw = [path]
    chat.encode_img(raw)
    images += raw
    conv.append_image()


CHATTED = {
    "user": lambda chat, conv, images, text: chat.ask(text, conv),
    "image": lambda chat, conv, images, name: chat.upload_img(image_path(name), conv, images),
    "image_encoded": lambda chat, conv, images, name: upload_encoded(
        chat, conv, images, image_path(name)
    ),
}


def image_path(name):
    return str(GOLDEN / HERE / "images" / name)


def play(chat, conv, images, events):
    """Play events until an answer is due; return those behind it."""
    while events:
        (kind, *what), *events = events
        if kind == "answer":
            return events
        handler(CHATTED, kind)(chat, conv, images, *what)
    return []


def assert_same_text(found, expected):
    """The release ends each answer at ###, ours one of Vicuna's; of bytes that are no text it shows the ASCII ones."""
    if "\N{REPLACEMENT CHARACTER}" not in expected:
        assert found.partition("###")[0].strip() == expected


@pytest.mark.parametrize(
    "case", [c for c in CHATS if "raises" not in c], ids=lambda case: case["name"]
)
def test_greedy_answers(chats, case):
    conv, chat = start(chats(case["model"]), case)
    images, events, embeds = [], case["events"], np.load(GOLDEN / HERE / "context_emb.npz")
    for number, turn in enumerate(case["turns"]):
        events = play(chat, conv, images, events)
        assert conv.messages == turn["prompt_messages"]
        notices = []
        options = {"do_sample": False, "on_notice": notices.append, **case["kwargs"]}
        if CUT in case["kwargs"]:  # the release cuts its front off; ours keeps it and writes less
            text, ids = chat.answer(conv, images, **options)
            assert notices and len(ids) < options["max_new_tokens"]
            return
        opened = conv.copy()
        opened.append_message(conv.roles[1], None)
        name = f"{case['name']}__turn{number}"
        if name in embeds:
            np.testing.assert_allclose(
                chat.get_context_emb(opened, images), embeds[name], atol=EMBEDS, rtol=0
            )
        text, ids = chat.answer(conv, images, **options)
        assert [*chat.encoder.bos, *ids.tolist()] == turn["returned_tokens"]
        assert_same_text(text, turn["text"])
        conv.messages[-1][1] = turn["text"]
    assert conv.messages == case["final_messages"]
    assert [list(image.shape) for image in images] == case["img_list_shapes"]


@pytest.mark.parametrize("case", [c for c in CHATS if "raises" in c], ids=lambda case: case["name"])
def test_what_fails_there_answers_here(chats, case):
    """Text alone, and a second image, uploaded and encoded later."""
    conv, chat = start(chats(case["model"]), case)
    images, events = [], case["events"]
    while events:
        events = play(chat, conv, images, events)
        chat.encode_img(images)
        text, ids = chat.answer(conv, images, do_sample=False, **case["kwargs"])
        assert len(ids) and conv.messages[-1] == [conv.roles[1], text]
    assert len(images) == sum(event[0] == "image" for event in case["events"])


@pytest.mark.parametrize("name", SCORED)
def test_logits_of_greedy_answers(chats, name):
    """After the repetition penalty, which a chat has by default: as the release's scores."""
    from minigpt4.conversation.sampling import Sampling, filter_logits

    case = next(case for case in CHATS if case["name"] == name)
    conv, chat = start(chats(case["model"]), case)
    assert chat.model.repetition_penalty == 1.05
    scores, images = np.load(GOLDEN / HERE / "scores.npz")[name], []
    play(chat, conv, images, case["events"])
    conv.append_message(conv.roles[1], None)
    llm, written = chat.model.llama_model, case["turns"][0]["returned_tokens"]
    answer = torch.tensor([written[1 : len(scores)]])
    sampling = Sampling(
        do_sample=False, repetition_penalty=case["kwargs"].get("repetition_penalty", 1.05)
    )
    with torch.no_grad():
        embeds = torch.cat(
            [chat.get_context_emb(conv, images), llm.get_input_embeddings()(answer)], 1
        )
        logits = llm(inputs_embeds=embeds).logits[0, -len(scores) :]
    for number, expected in enumerate(scores):
        found = filter_logits(
            logits[number][None], torch.tensor([written[: number + 1]]), sampling
        )[0]
        kept = np.isfinite(expected)
        np.testing.assert_allclose(found.numpy()[kept], expected[kept], atol=SCORES, rtol=0)


@needs(f"{HERE}/stream.json")
def test_a_stream_is_the_answer(chats):
    stream = read(f"{HERE}/stream.json")
    case = next(case for case in CHATS if case["name"] == stream["same_as"])
    conv, chat = start(chats(case["model"]), case)
    images = []
    play(chat, conv, images, case["events"])
    pieces = list(chat.stream_answer(conv, images, do_sample=False, **case["kwargs"]))
    # the release leaves None there
    assert "".join(pieces) == stream["joined"].strip() == conv.messages[-1][1]


@pytest.mark.parametrize(
    "case", read(f"{HERE}/answer_postprocess.json"), ids=lambda case: str(case["ids"])[:30]
)
def test_text_of_an_answer(encoder, case):
    """As the release's chat, but the pad token is text, and nothing before "Assistant:" is dropped."""
    text = AnswerText(encoder.tokenizer, ("###",)).whole(case["ids"])
    pad_id = next(config["pad_token_id"] for config in CONFIGS.values())
    pad = encoder.tokenizer.convert_ids_to_tokens(pad_id)
    assert text.rpartition("Assistant:")[2].replace(pad, "").strip() == case["chat_answer"]


@pytest.mark.parametrize(
    "row", read(f"{HERE}/stopping.json"), ids=lambda row: str(row["sequences"])
)
def test_stops_end_each_sequence_by_itself(row):
    """The release ends all when all end in one step, and repeats a short sequence along a longer stop."""
    ended = StoppingCriteriaSub(row["stops"])(torch.tensor(row["sequences"])).tolist()
    assert ended == [
        any(ids[-len(stop) :] == stop for stop in row["stops"]) for ids in row["sequences"]
    ]
    if len(ended) == 1 and len(row["sequences"][0]) >= max(map(len, row["stops"])):
        assert ended == [row["stop"]]


@needs(f"{HERE}/encode_img_inputs.json")
def test_images_that_encode_img_takes(chats):
    from PIL import Image

    chat, rows = chats(V2), read(f"{HERE}/encode_img_inputs.json")
    path = sorted((GOLDEN / HERE / "images").iterdir())[0]
    image = Image.open(path).convert("RGB")
    pixels = chat.vis_processor(image)
    given = {
        "path": str(path),
        "pil_rgb": image,
        "tensor3": pixels,
        "tensor4": pixels[None],
        "numpy": np.array(image),
    }
    for name, source in given.items():
        images = [source]
        chat.encode_img(images)
        assert list(images[0].shape) == rows["path"]["shape"]
        # 256 values of 1e-6
        assert images[0].sum().item() == pytest.approx(rows["path"]["sum"], rel=0, abs=1e-3), name
    for mode in ("L", "RGBA"):
        images = [image.convert(mode)]
        chat.encode_img(images)
        assert list(images[0].shape) == rows["path"]["shape"]
    with pytest.raises(
        ImageError,
        match=r"^image: NoneType; expected a path, a PIL or numpy image or a tensor of pixels",
    ):
        chat.encode_img([None])
