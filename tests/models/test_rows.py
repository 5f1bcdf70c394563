"""Rows with any number of images and turns: both layouts agree with each other, with single samples and with a chat."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.message import Message
from minigpt4.models.llm import layouts
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.rows import IGNORED, IMAGE_ID, batch_rows, context_ids, split_batch
from minigpt4.text.segments import IMAGE, message_segments
from minigpt4.text.templates import CHATML, LLAMA2, VICUNA_V0, template_for
from tests.golden.model import CONFIG, golden_model
from tests.models.test_packing import family

# Relative, float32. Measured on the golden model: loss 1.4e-7, gradient 8.7e-7.
TOLERANCE = 5e-6
SIZE, QUERIES = CONFIG["image_size"], CONFIG["num_query_token"]
TEMPLATE = {"prompt_template": VICUNA_V0.training, "end_sym": "###"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden_model(tmp_path_factory.mktemp("model"), max_txt_len=60, **TEMPLATE).train()


def batch(*samples):
    """Return a batch of samples {"images": number of images, "text_input" or "turns", "instruction"}."""
    counts = [sample.get("images", 1) for sample in samples]
    generator = torch.Generator().manual_seed(5)
    return {
        "image": torch.randn(sum(counts), 3, SIZE, SIZE, generator=generator),
        "num_images": counts,
        "text_input": [sample.get("text_input", "") for sample in samples],
        "instruction": [sample.get("instruction", "") for sample in samples],
        "turns": [sample.get("turns", ()) for sample in samples],
        "iters": 0,
    }


def loss_and_gradient(model, samples, backend, limit=None):
    """Return the loss and llama_proj's gradient; `limit`: split the batch into parts of at most so many tokens."""
    model.llm_backend = backend
    model.zero_grad()
    total = 0
    for part, share in [(samples, 1)] if limit is None else model.split(samples, limit):
        loss = model(part)["loss"] * share
        loss.backward()
        total += loss.item()
    return total, model.llama_proj.weight.grad.clone()


def assert_equal(found, expected):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert (gradient - expected_gradient).norm() <= TOLERANCE * expected_gradient.norm()


TWO_IMAGES = {
    "images": 2,
    "turns": [("Which one is red?", "The second."), ("Why?", "It is a bus.")],
}
IN_THE_MIDDLE = {
    "images": 3,
    "turns": [
        (("Beside ", IMAGE, ", is ", IMAGE, " older?"), "No."),
        (("And ", IMAGE, "?"), "Yes, by far."),
    ],
}
TEXT_ONLY = {"images": 0, "turns": [("What is a bus?", "A large car.")]}
BATCHES = {
    "two images": [TWO_IMAGES, {"text_input": "a bus"}],
    "images in the middle of later questions": [IN_THE_MIDDLE, TWO_IMAGES],
    "text beside images": [
        TEXT_ONLY,
        {"text_input": "a red bus", "instruction": "Describe it."},
        TEXT_ONLY,
    ],
    "several images and a caption": [{"images": 3, "text_input": "three buses"}],
}


@pytest.mark.parametrize("name", BATCHES)
def test_any_images_at_any_place(name, model):
    samples = batch(*BATCHES[name])
    padded = loss_and_gradient(model, samples, "padded")
    for backend in ("packed", "lean"):
        assert_equal(loss_and_gradient(model, samples, backend), padded)
    for backend in ("padded", "packed", "lean"):
        assert_equal(loss_and_gradient(model, samples, backend, limit=60), padded)


def test_a_batch_without_any_image_trains_without_a_gradient_of_its_own(model):
    """There is a loss, and the projection has a gradient of zeros, so that every rank takes part in the mean."""
    losses = [
        loss_and_gradient(model, batch(TEXT_ONLY, TEXT_ONLY), backend)
        for backend in ("padded", "lean")
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=TOLERANCE)
    assert not any(gradient.any() for _, gradient in losses)


def test_images_reach_their_own_places(model):
    """The vectors of each image are at its slot, in the order of the batch."""
    samples = batch(IN_THE_MIDDLE, TEXT_ONLY, TWO_IMAGES)
    vectors = model.encode_images(samples["image"])
    inputs, _ = model.build_inputs(samples)
    rows = model.rows(samples)
    assert [list(row.images) for row in rows] == [[0, 1, 2], [], [3, 4]]
    for row, embeds in zip(rows, inputs["inputs_embeds"], strict=True):
        places = [place for place, index in enumerate(row.ids) if index == IMAGE_ID]
        own = vectors[list(row.images)].flatten(0, 1)
        torch.testing.assert_close(embeds[places], own, rtol=0, atol=0)


def test_an_image_that_is_cut_off_is_not_fed(tmp_path):
    """A question that is cut off takes its image and its answer with it; the next sample still gets its own image."""
    model = golden_model(tmp_path, max_txt_len=4, **TEMPLATE).train()
    samples = batch(IN_THE_MIDDLE, {"text_input": "a bus"})
    first, second = model.rows(samples)
    assert (list(first.images), list(second.images)) == ([0, 1], [3])
    assert first.ids.count(IMAGE_ID) == 2 * QUERIES and first.num_cut > QUERIES
    assert_equal(
        loss_and_gradient(model, samples, "lean"), loss_and_gradient(model, samples, "padded")
    )


def test_more_slots_than_images_are_refused(model):
    with pytest.raises(
        ValueError, match=r"^turns: 3 image slots in the questions, the sample has 2 images$"
    ):
        model.rows(batch(IN_THE_MIDDLE | {"images": 2}))


def test_the_projection_is_accumulated_over_batches(model):
    """Gradient accumulation over a batch with images and one without gives the gradient of the mean loss."""
    parts = [batch(TWO_IMAGES), batch(TEXT_ONLY)]
    for backend in ("padded", "lean"):
        model.llm_backend = backend
        model.zero_grad()
        for part in parts:
            (model(part)["loss"] / 2).backward()
        accumulated = model.llama_proj.weight.grad.clone()
        _, alone = loss_and_gradient(model, parts[0], backend)
        torch.testing.assert_close(accumulated, alone / 2, rtol=0, atol=0)


def test_a_cut_conversation_is_said_on_every_path(tmp_path, caplog):
    from minigpt4.text.cutting import warn_of_cut

    model = golden_model(tmp_path, max_txt_len=4, **TEMPLATE)
    for backend in ("padded", "packed", "lean"):
        warn_of_cut.cache_clear()
        caplog.clear()
        model.llm_backend = backend
        model(batch(TWO_IMAGES))
        said = [message for message in caplog.messages if "cut off" in message]
        assert len(said) == 1 and said[0].startswith(
            "a conversation is longer than model.max_txt_len=4 tokens"
        )


# random batches

WORDS_OF_A_CAPTION = [
    "a",
    "red",
    "bus",
    "###",
    "</s>",
    "stops",
    "<ImageHere>",
    "in",
    "東京",
    "😀",
    ".",
    "?",
]
WORDS = st.lists(st.sampled_from(WORDS_OF_A_CAPTION), max_size=8).map(" ".join)
TYPED = WORDS.map(lambda text: f"x {text}")


@st.composite
def sample(draw):
    """A caption, an instruction with its answer, or a dialogue whose images stand anywhere."""
    kind = draw(st.sampled_from(["caption", "instruction", "turns"]))
    images = draw(st.integers(0, 3))
    if kind == "caption":
        return {"images": images, "text_input": draw(WORDS)}
    if kind == "instruction":
        return {"images": images, "text_input": draw(WORDS), "instruction": draw(TYPED)}
    turns = [[draw(TYPED), draw(TYPED)] for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        places = [draw(st.integers(0, len(turns) - 1)) for _ in range(images)]
        for number, turn in enumerate(turns):
            turn[0] = (*[IMAGE] * places.count(number), turn[0]) if images else turn[0]
    return {"images": images, "turns": [tuple(turn) for turn in turns]}


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(sample(), min_size=1, max_size=4))
def test_packed_is_padded_is_each_sample_alone(model, samples):
    whole = batch(*samples)
    rows = model.rows(whole)
    counts = [row.num_targets for row in rows]
    padded = loss_and_gradient(model, whole, "padded")
    assert_equal(loss_and_gradient(model, whole, "lean"), padded)
    # the mean over samples, weighted by targets, is the batch's
    total, gradient = 0, 0
    for part, share in split_batch(whole, rows, max_tokens=1):
        loss, own = loss_and_gradient(model, part, "padded")
        total, gradient = total + share * loss, gradient + share * own
    assert sum(counts) > 0
    assert_equal((total, gradient), padded)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=st.lists(st.tuples(TYPED, TYPED), min_size=1, max_size=3), images=st.integers(0, 2))
def test_a_row_is_what_the_chat_feeds(chatml_tokenizer, turns, images):
    """The ids agree up to the last answer, which a chat has yet to generate. With ChatML, chat and training prompts agree."""
    chatml_tokenizer.pad_token = chatml_tokenizer.eos_token
    encoder = PromptEncoder(chatml_tokenizer)
    conv = Conversation(CHATML)
    for number, (question, answer) in enumerate(turns):
        parts = (*[IMAGE] * images, question) if number == 0 else (question,)
        last = number == len(turns) - 1
        asked, told = (Message(message_segments(each)) for each in (parts, [answer]))
        conv.messages += [["user", asked], ["assistant", None if last else told]]
    fed = context_ids(conv.segments(), encoder, [2] * images)
    section = type("Section", (), {"prompt_template": CHATML.training, "end_sym": "<|im_end|>"})
    section.max_txt_len = section.max_context_len = 10_000
    section.mask_eos_labels = section.chat_template = False
    samples = {"text_input": [""], "turns": [turns], "num_images": [images]}
    (row,) = batch_rows(samples, "", section, encoder, num_image_tokens=2)
    assert row.ids[: len(fed)] == fed
    last = chatml_tokenizer.decode([label for label in row.labels[len(fed) :] if label != IGNORED])
    assert last == CHATML.neutralise(turns[-1][1]) + "<|im_end|>"


def test_an_instruction_is_a_dialogue_of_one_turn(model):
    for text in ("Which colour?", "hi###Assistant: yes", "<ImageHere></s>"):
        instruction = model.rows(batch({"text_input": "Red.", "instruction": text}))
        turn = model.rows(batch({"turns": [(text, "Red.")]}))
        assert instruction == turn


def test_template_for_training_keeps_its_chat():
    for template, end in ((VICUNA_V0, "###"), (LLAMA2, "</s>"), (CHATML, "<|im_end|>")):
        training = template.for_training(template.training, end)
        first = training.system + "{}".join(training.user)
        assert first == template.training
        assert training.separator == template.assistant[1].removeprefix(end)
        assert template_for(template.training, end) is template


# weights of the LLM that train

TRAINED = ["LlamaConfig", "Qwen3Config", "OlmoeConfig", "MistralConfig, window"]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("trained", ["all", "one layer", "query projections"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_llm_weights_are_transformers_own(name, trained, recompute):
    """Packed rows, compared with each row alone through the model of transformers. Measured: at most 2.1e-6."""
    from minigpt4.models.llm import backends, row_logits
    from minigpt4.text.rows import Row

    llm = family(name).train()
    chosen = {"all": "", "one layer": "layers.1.", "query projections": "q_proj"}[trained]
    for parameter_name, parameter in llm.named_parameters():
        parameter.requires_grad_(chosen in parameter_name)
    assert backends.choose(llm) == "packed"  # "lean" gives no gradient to weights
    texts = [[1, 5, 9, 2, 7], [1, 5, 3], [1, 5, 8, 8, 4, 6]]
    rows = [Row(ids, [IGNORED] * 2 + ids[2:], 2, range(0), 0) for ids in texts]
    images = torch.zeros(0, 2, 16)

    def gradients(loss):
        llm.zero_grad()
        loss.backward()
        return {key: p.grad for key, p in llm.named_parameters() if p.grad is not None}

    packed = layouts.pack(rows, 2, may_share=False)
    losses = row_logits.packed(llm, packed, images, backends.PACKED["packed"], recompute)
    found = gradients(losses.mean())
    losses = []
    for row in rows:
        logits = llm(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        losses.append(
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        )
    expected = gradients(sum(losses) / len(packed.targets))
    assert found.keys() == expected.keys() and found
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-5 * total, key


def test_a_model_whose_llm_begins_to_train_leaves_the_lean_path(tmp_path):
    model = golden_model(tmp_path, **TEMPLATE).train()
    samples = batch(TWO_IMAGES, {"text_input": "a bus"})
    assert model.choose_backend() == "lean"
    weight = model.llama_model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(True)
    assert model.choose_backend() == "packed"
    model(samples)["loss"].backward()
    gradient = weight.grad.clone()
    _, _ = loss_and_gradient(model, samples, "padded")
    assert gradient.norm() > 0
    assert (weight.grad - gradient).norm() <= 1e-5 * gradient.norm()
    weight.requires_grad_(False)
    assert model.choose_backend() == "lean"


@pytest.mark.parametrize(
    "sample, words",
    [
        ({"text_input": None}, "unsupported operand"),
        ({"text_input": 7}, "unsupported operand"),
        ({"turns": [("What is it?", None)]}, ""),
        (
            {"turns": [([IMAGE, IMAGE, "What?"], "A bus.")]},
            "2 image slots in the questions, the sample has 1 images",
        ),
    ],
)
def test_a_sample_whose_text_cannot_be_read_is_named(model, sample, words):
    samples = batch({"text_input": "A bus."}, sample, {"text_input": "A car."})
    named = samples | {"sample_id": ["mine/1", "mine/2", "mine/3"]}
    start = rf"^the text of 1 of the batch's 3 samples cannot be read \(mine/2: .*{words}"
    with pytest.raises(ValueError, match=start):
        model.rows(named)
    # without ids, by its index
    with pytest.raises(ValueError, match=r"samples cannot be read \(1: "):
        model.rows(samples)


def test_what_is_wrong_with_every_sample_is_no_sample_s_fault(model, monkeypatch):
    monkeypatch.setattr(model, "prompt_template", "")
    samples = batch(*[{"instruction": "Describe it.", "text_input": "A bus."}] * 2)
    with pytest.raises(ValueError, match=r"^model\.prompt_template: '' cannot tell"):
        model.rows(samples)
