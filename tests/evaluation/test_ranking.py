"""Candidates ranked by loss: the losses are those of the plain LLM, and independent of other items and options."""

import pytest
import torch

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.evaluation.answering import answers
from minigpt4.evaluation.items import Item
from minigpt4.evaluation.ranking import RULES, candidate_losses
from tests.conversation.conftest import chat, golden_model, vis_processor  # noqa: F401
from tests.small_release import picture

OPTIONS = ["the old wall", "water", "no", "It is a red circle on a grey wall."]
ITEMS = [
    Item("one", (picture(0),), "what is it?", OPTIONS),
    Item("two", (picture(1), picture(2)), "which is the old wall", OPTIONS[:2]),
    Item("none", (), "who watched?", OPTIONS[1:]),
    Item("again", (picture(0),), "and the water?", OPTIONS[:1]),
]
# Relative, float32. Measured: 2.3e-7.
TOLERANCE = 5e-6


def by_hand(chat, item, option):  # noqa: F811
    """Return (sum of the losses of an option and its end symbol, their number, number of all positions) by the plain LLM."""
    conv, images = CONV_VISION.copy(), []
    for image in item.images:
        chat.upload_img(image, conv, images)
    chat.ask(item.question, conv)
    conv.append_message(conv.roles[1], None)
    context = chat.get_context_emb(conv, images)
    ids = chat.model.llama_tokenizer(
        option + "###", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    embeds = torch.cat([context, chat.model.llama_model.get_input_embeddings()(ids)], dim=1)
    with torch.no_grad():
        logits = chat.model.llama_model(inputs_embeds=embeds).logits[0, context.shape[1] - 1 : -1]
    return (
        torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item(),
        ids.shape[1],
        embeds.shape[1],
    )


@pytest.mark.parametrize("backend", ["padded", "packed", "lean"])
def test_losses_are_those_of_the_plain_llm_by_each_rule(chat, backend, monkeypatch):  # noqa: F811
    chat.model.choose_backend()
    monkeypatch.setattr(chat.model, "llm_backend", backend)
    found = {rule: candidate_losses(chat, CONV_VISION, ITEMS, rule) for rule in RULES}
    for item in ITEMS:
        for number, option in enumerate(item.options):
            total, num_tokens, num_positions = by_hand(chat, item, option)
            expected = {
                "sum": total,
                "mean": total / num_tokens,
                "release": total / (num_positions - 1),
            }
            assert {rule: found[rule][item.id][number] for rule in RULES} == pytest.approx(
                expected, rel=TOLERANCE
            )


def test_a_loss_is_independent_of_other_items_and_an_image_is_encoded_once(chat, monkeypatch):  # noqa: F811
    encoded, encode_img = [], chat.model.encode_img
    monkeypatch.setattr(
        chat.model, "encode_img", lambda image: encoded.append(len(image)) or encode_img(image)
    )
    together = candidate_losses(chat, CONV_VISION, ITEMS)
    assert encoded == [4]
    for item in ITEMS:
        alone = candidate_losses(
            chat, CONV_VISION, [item._replace(options=item.options[-1:])], batch_size=1
        )
        assert together[item.id][-1] == pytest.approx(alone[item.id][0], rel=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("rule", RULES)
def test_items_with_options_get_the_least_loss_among_generated_ones(chat, rule, batch_size):  # noqa: F811
    items = [*ITEMS[:2], ITEMS[2]._replace(options=()), ITEMS[3]]
    sampling = {"temperature": 0, "max_new_tokens": 5, "batch_size": batch_size}
    lines = {
        line["id"]: line for line in answers(chat, CONV_VISION, items, ranking=rule, **sampling)
    }
    assert lines.keys() == {item.id for item in items}
    losses = candidate_losses(chat, CONV_VISION, [item for item in items if item.options], rule)
    for item in filter(lambda item: item.options, items):
        best = min(zip(losses[item.id], item.options, strict=True))[1]
        assert lines[item.id] == {"id": item.id, "answer": best}
    assert lines["none"] == next(answers(chat, CONV_VISION, items[2:3], **sampling))


def test_what_cannot_be_ranked_is_refused(chat, tmp_path):  # noqa: F811
    with pytest.raises(
        ValueError, match=r"^ranking: unknown rule 'meam'; known: release, mean, sum$"
    ):
        candidate_losses(chat, CONV_VISION, ITEMS, "meam")
    with pytest.raises(ValueError, match=r"^item 'a': image: no file"):
        candidate_losses(
            chat, CONV_VISION, [Item("a", (tmp_path / "absent.png",), "what?", OPTIONS)]
        )
    items = [ITEMS[0], ITEMS[0]._replace(id="long", options=["x y " * 3000, "no"])]
    lines = {line["id"]: line for line in answers(chat, CONV_VISION, items)}
    assert "shorten them" in lines["long"]["error"] and lines["one"]["answer"] in OPTIONS
