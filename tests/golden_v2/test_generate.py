"""Answers of a batch and the choice among candidates (set e) are those of the newest release."""

import numpy as np
import pytest
import torch

from tests.golden_v2 import GOLDEN, needs, read
from tests.golden_v2.model import V2, golden_model

pytestmark = needs("e_generate")
HERE = "e_generate"
CASES = read(f"{HERE}/generate.json")
RANKED = read(f"{HERE}/multi_select.json", {"cases": []})["cases"]
EMBEDS, LOSS = 1e-5, 2e-5  # the fixtures' README


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function of a fixture's model name that gives its model, built once."""
    built = {}

    def model(name):
        if name not in built:
            built[name] = golden_model(name, tmp_path_factory.mktemp(name), end_sym="</s>")
        return built[name]

    return model


def images_of(case, name):
    return torch.from_numpy(np.load(GOLDEN / HERE / name)["image"][case["image_rows"]])


@pytest.mark.parametrize(
    "case", [c for c in CASES if "raises" not in c], ids=lambda case: case["name"]
)
def test_answers(models, case):
    model, images = models(case["model"]), images_of(case, "generate.npz")
    # the release leaves images without a text out, and does not say so
    images = images[: len(case["texts"])]
    golden = np.load(GOLDEN / HERE / "generate.npz")
    embeds, mask = model.prompt_embeds(images, case["texts"])
    assert mask.tolist() == case["attention_mask"] and list(embeds.shape) == case["embs_shape"]
    if f"inputs_embeds__{case['name']}" in golden:
        np.testing.assert_allclose(
            embeds.detach(), golden[f"inputs_embeds__{case['name']}"], atol=EMBEDS, rtol=0
        )
    # ignored there
    options = {key: value for key, value in case["kwargs"].items() if key != "stop_words_ids"}
    answers = model.generate(images, case["texts"], **options)
    # without BOS, which the release's transformers put first
    assert answers == [model._answer_text(ids[1:]) for ids in case["sequences"]]
    for found, expected in zip(answers, case["answers"], strict=True):
        # bytes that are no text
        assert "\N{REPLACEMENT CHARACTER}" in expected or found == expected


@needs(f"{HERE}/generate.json")
def test_stops_end_each_answer_by_itself(models):
    """A token, and a pair of tokens, of the first answer: the second goes on."""
    model = models(V2)
    case = next(
        case for case in CASES if case["model"] == V2 and len(case.get("sequences", ())) > 1
    )
    images, texts = images_of(case, "generate.npz")[:2], case["texts"][:2]
    first, second = (ids[1:] for ids in case["sequences"][:2])
    for stop in ([first[2]], [first[1:3]]):
        answers = model.generate(images, texts, max_new_tokens=len(second), stop_words_ids=stop)
        assert answers == [model._answer_text(first[:3]), model._answer_text(second)]


@pytest.mark.parametrize("case", [c for c in CASES if "raises" in c], ids=lambda case: case["name"])
def test_what_fails_is_explained(models, case):
    with pytest.raises(
        ValueError,
        match=r"^(\d+ images and \d+ texts|texts\[\d\]: '.*' has \d <ImageHere>); expected",
    ):
        models(case["model"]).generate(
            images_of(case, "generate.npz"), case["texts"], **case["kwargs"]
        )


# with chat_template what is typed is text: a prompt's own <s>[INST] cannot be the template's a second time
TYPED = [
    c
    for c in RANKED
    if c["settings"]["chat_template"] and any("[INST]" in text for text in c["instructions"])
]


@pytest.mark.parametrize(
    "case", [c for c in RANKED if c not in TYPED], ids=lambda case: case["name"]
)
def test_candidates(models, case, monkeypatch):
    """The release's loss of a candidate is the sum over its tokens, by the length of the batch that it is in."""
    model, images = models(V2), images_of(case, "multi_select.npz")
    for key, value in case["settings"].items():
        monkeypatch.setattr(model, key, value)
    texts, candidates = case["instructions"], case["candidates"]
    losses = model.candidate_losses(images, texts, candidates)
    for number, answers in enumerate(candidates):
        rows = model.rows({"image": images, "instruction_input": texts, "answer": answers})
        length = max(row.num_prompt for row in rows) + max(
            len(row.ids) - row.num_prompt for row in rows
        )
        theirs = losses[:, number] / (length - 1)
        np.testing.assert_allclose(
            theirs, case["losses_per_candidate_then_sample"][number], atol=LOSS, rtol=0
        )


@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("case", RANKED, ids=lambda case: case["name"])
def test_ranks_do_not_depend_on_the_batch(models, case, score, monkeypatch):
    model, images = models(V2), images_of(case, "multi_select.npz")
    for key, value in case["settings"].items():
        monkeypatch.setattr(model, key, value)
    texts, candidates, number = case["instructions"], case["candidates"], case["num_cand"]
    ranks = model.multi_select(images, texts, candidates, number, score)
    for row, text in enumerate(texts):
        own = [[answers[row]] for answers in candidates]
        alone = model.multi_select(
            images[row : row + 1], [text], own, number and [number[row]], score
        )
        assert alone == [ranks[row]]
        losses = model.candidate_losses(images, texts, candidates, score)[row]
        best = ranks[row][: number[row] if number else None]
        if score == "sum":
            assert losses[best].tolist() == sorted(losses[best].tolist())
