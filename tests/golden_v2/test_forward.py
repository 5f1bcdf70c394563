"""The whole forward pass equals that of the newest release (sets a, b, c): tokens, embeddings, labels, loss, gradients.

Where the release loses data, fails or masks what it should not, ours does better, and the test says how; which cases
these are is read off the fixtures.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from minigpt4.models.llm import backends
from minigpt4.text.rows import IGNORED
from minigpt4.text.segments import IMAGE_SLOT
from tests.golden_v2 import GOLDEN, read
from tests.golden_v2.model import (
    CONFIGS,
    DIMS,
    FOLDERS,
    golden_model,
    llm_folder,
    set_up,
    with_images,
)

# The fixtures' README: measured between torch versions 1.9e-6, 2.9e-6, 9.8e-6 and 2.8e-5.
EMBEDS, LOSS, GRADIENT, LORA_GRADIENT = 1e-5, 2e-5, 5e-5, 1e-4
BACKENDS = ("packed", "padded")  # lean where no weight of the LLM trains


def texts_of(case):
    return [
        text
        for key in ("instruction_input", "answer", "conv_q", "conv_a")
        for text in case["samples"].get(key, ())
    ]


def num_images(case):
    """Return how many images each sample of a case has."""
    samples = case["samples"]
    size = len(samples.get("answer") or samples["conv_q"])
    shape = case["image_shape"]
    if not shape:
        return [0] * size
    return samples.get("length", [shape[1] if len(shape) == 5 else 1] * size)


def fault(case, config):
    """Return what the release does wrong in a case; None where its numbers hold."""
    samples, settings = case["samples"], case["settings"]
    questions = samples.get("instruction_input") or samples.get("conv_q") or []
    if questions and [text.count(IMAGE_SLOT) for text in questions] != num_images(case):
        return "images"
    if "conv_q" in samples:
        if max(map(str.count, questions, [IMAGE_SLOT] * len(questions))) > 1:
            return "second image"
        symbols = zip(samples["conv_q"], samples["conv_a"], samples["connect_sym"], strict=True)
        if any(q.count(symbol) != a.count(symbol) for q, a, symbol in symbols):
            return "answers"
    if "raises" in case:
        return "fails" if any(samples.get("answer", ())) or settings["end_sym"] else "no target"
    if any(
        special in text
        for special in ("<s>", "</s>", "[INST]", "###")
        for text in samples.get("instruction_input", ())
    ):
        return "typed special tokens"
    if any(config.get("pad_token", "$$") in text for text in texts_of(case)):
        return "pad token in the text"
    if "" in questions:
        return "empty prompt"
    if not case["image_shape"] and "not_truncated" in case["name"]:
        return "text alone is not cut"
    return None


def cases(*kinds):
    """Return the parameters (folder, case) of all cases with one of these faults."""
    found = []
    for which in FOLDERS:
        for case in read(f"{which}/forward_cases.json"):
            if fault(case, CONFIGS[which]) in kinds:
                found.append(pytest.param(which, case, id=f"{which}-{case['name']}"))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function of a folder's name that gives its model, built once."""
    built = {}

    def model(which):
        if which not in built:
            built[which] = golden_model(which, tmp_path_factory.mktemp(which))
        return built[which]

    return model


def played(models, which, case):
    """Return (model, samples, what the fixture says) of a case; for a case that fails there is nothing said."""
    model = models(which)
    golden = np.load(GOLDEN / which / case["npz"]) if "npz" in case else {}
    longest = golden["cond_lengths"].max() if golden else DIMS["tokens_per_image"]
    samples = set_up(model, case, CONFIGS[which], longest)
    return model, with_images(samples, which, case), golden


def assert_close(found, expected, atol):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=atol)


def assert_inputs(model, samples, golden, may_differ=IGNORED):
    """Each row's embeddings, length and labels are the fixture's; `may_differ`: a token that it does not learn."""
    inputs, _ = model.build_inputs(samples)
    rows = model.rows(samples)
    assert [row.num_prompt - 1 for row in rows] == golden["cond_lengths"].tolist()
    for number, row in enumerate(rows):
        length = len(row.ids)
        assert inputs["attention_mask"][number].tolist() == [1] * length + [0] * (
            len(inputs["labels"][0]) - length
        )
        assert_close(
            inputs["inputs_embeds"][number, :length],
            golden["inputs_embeds"][number, :length],
            EMBEDS,
        )
        expected = golden["targets"][number]
        found = [IGNORED if label == may_differ else label for label in row.labels]
        assert found == expected[:length].tolist() and set(expected[length:]) <= {IGNORED}


@pytest.mark.parametrize(("which", "case"), cases(None))
def test_inputs(models, which, case):
    model, samples, golden = played(models, which, case)
    if "img_embeds" in golden:
        image = samples["image"]
        vectors = model.encode_images(image.flatten(0, 1) if image.ndim == 5 else image)
        assert_close(vectors, golden["img_embeds"], EMBEDS)
    assert_inputs(model, samples, golden)
    for row, mask in zip(model.rows(samples), golden["attention_mask"], strict=True):
        # a question whose answer does not fit is left out
        assert len(row.ids) == mask.sum() or (
            "conv_q" in samples and row.num_cut and len(row.ids) < mask.sum()
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("which", "case"), [c for c in cases(None) if c.values[1]["reduction"] == "mean"]
)
def test_loss_and_gradients(models, which, case, backend, monkeypatch):
    model, samples, golden = played(models, which, case)
    usual = model.choose_backend()
    assert usual in backends.PACKED  # packing is what this LLM can take
    monkeypatch.setattr(model, "llm_backend", backend if backend == "padded" else usual)
    model.zero_grad(set_to_none=True)
    loss = model(samples)["loss"]
    assert loss.item() == pytest.approx(case["loss"], rel=0, abs=LOSS)
    if not any(num_images(case)) and not model.lora_r:
        loss.backward()  # nothing that trains was used: the release fails here, ours has a gradient of zeros
        assert not model.llama_proj.weight.grad.any()
        return
    loss.backward()
    own = model._release_parameters()
    for name in golden:
        kind, _, parameter = name.partition("__")
        if not kind.startswith("grad"):
            continue
        gradient = own[parameter].grad[:4] if kind == "grad_rows0to3" else own[parameter].grad
        assert_close(gradient, golden[name], LORA_GRADIENT if ".lora_" in parameter else GRADIENT)
    without = [name for name, tensor in own.items() if tensor.requires_grad and tensor.grad is None]
    assert without == case["grad_is_none"]


@pytest.mark.parametrize(
    ("which", "case"), [c for c in cases(None) if c.values[1]["reduction"] == "none"]
)
def test_losses_of_samples(models, which, case):
    """The release divides a sample's sum by the padded length of its batch; ours says the sum, and of how many."""
    model, samples, golden = played(models, which, case)
    found = model(samples, reduction="none")
    length = golden["inputs_embeds"].shape[1]
    np.testing.assert_allclose(
        found["loss"].detach() / (length - 1), golden["loss"], rtol=0, atol=LOSS
    )
    assert found["num_targets"].tolist() == (golden["part_targets"] != IGNORED).sum(1).tolist()


@pytest.mark.parametrize(("which", "case"), cases("pad token in the text"))
def test_a_pad_token_in_the_text_is_read_and_learnt(models, which, case):
    """The release does not attend to it in a conversation, and does not learn it in an answer."""
    model, samples, golden = played(models, which, case)
    pad_id = CONFIGS[which]["pad_token_id"]
    rows, inputs = model.rows(samples), model.build_inputs(samples)[0]
    for number, row in enumerate(rows):
        length = len(row.ids)
        assert_close(
            inputs["inputs_embeds"][number, :length],
            golden["inputs_embeds"][number, :length],
            EMBEDS,
        )
        unseen = np.flatnonzero(golden["attention_mask"][number, :length] == 0)
        assert {row.ids[place] for place in unseen} <= {pad_id}
        expected = golden["targets"][number, :length].tolist()
        different = [place for place in range(length) if row.labels[place] != expected[place]]
        assert all(
            row.labels[place] == pad_id and expected[place] == IGNORED for place in different
        )
        assert len(unseen) + len(different) > 0


@pytest.mark.parametrize(("which", "case"), cases("typed special tokens"))
def test_typed_special_tokens_are_text(models, which, case):
    """In the release a question can hold <s> and [INST] and so forge a turn; answers are equal, pad tokens aside."""
    model, samples, golden = played(models, which, case)
    pad_id, own = CONFIGS[which]["pad_token_id"], model.encoder.special_ids.values()
    for row, targets in zip(model.rows(samples), golden["targets"], strict=True):
        assert not set(row.ids[1 : row.num_prompt]) & set(own)
        learnt = [label for label in row.labels if label not in (IGNORED, pad_id)]
        assert learnt == targets[targets != IGNORED].tolist()


@pytest.mark.parametrize(("which", "case"), cases("empty prompt"))
def test_bos_is_seen_before_an_empty_prompt(models, which, case):
    """The release masks BOS where it has nothing behind it."""
    model, samples, golden = played(models, which, case)
    assert_inputs(model, samples, golden)
    mask = model.build_inputs(samples)[0]["attention_mask"]
    assert mask[:, 0].tolist() == [1] * len(mask) and golden["attention_mask"][:, 0].min() == 0
    assert torch.isfinite(model(samples)["loss"])


@pytest.mark.parametrize(("which", "case"), cases("text alone is not cut"))
def test_prompts_of_text_alone_are_cut_too(models, which, case):
    """The limit is that of prompts with images."""
    model, samples, golden = played(models, which, case)
    limit = case["settings"]["max_context_len"]
    for row, length, embeds in zip(
        model.rows(samples), golden["cond_lengths"], golden["inputs_embeds"], strict=True
    ):
        assert row.num_prompt - 1 == min(length, limit) < length
        words = model.llama_model.get_input_embeddings()(torch.tensor(row.ids[: row.num_prompt]))
        assert_close(words, embeds[: row.num_prompt], EMBEDS)


@pytest.mark.parametrize(("which", "case"), cases("images", "answers", "no target"))
def test_what_loses_data_is_refused(models, which, case):
    """The release leaves images and answers out without a word; the error names the sample."""
    model, samples, _ = played(models, which, case)
    expected = {
        "images": r"\d image slots in the questions, the sample has \d images",
        "answers": r"^sample 0: \d questions in conv_q, \d answers in conv_a; expected as many, joined by '!@#'$",
        "no target": r"^batch has no target token: all 1 captions are empty",
    }[fault(case, CONFIGS[which])]
    with pytest.raises(ValueError, match=expected):
        model(samples)


@pytest.mark.parametrize(("which", "case"), cases("second image"))
def test_each_image_of_a_conversation_is_seen(models, which, case):
    """The release takes the first one alone."""
    model, samples, golden = played(models, which, case)
    (row,), total = model.rows(samples), sum(text.count(IMAGE_SLOT) for text in texts_of(case))
    assert list(row.images) == list(range(total))
    assert row.num_prompt - 1 == golden["cond_lengths"][0] + (total - 1) * DIMS["tokens_per_image"]


@pytest.mark.parametrize(("which", "case"), cases("fails"))
def test_what_fails_there_trains_here(models, which, case):
    """Empty pieces of text, braces in a template, no prompt, no instruction: all images and answers are there."""
    model, samples, _ = played(models, which, case)
    rows = model.rows(samples)
    assert [len(row.images) for row in rows] == num_images(case)
    ends = model.encoder.tokenizer(case["settings"]["end_sym"], add_special_tokens=False).input_ids
    assert all(row.num_cut or row.labels[-1] == ends[-1] for row in rows)
    assert torch.isfinite(model(samples)["loss"])


@pytest.mark.parametrize("which", FOLDERS)
def test_what_trains_and_what_is_printed(which, tmp_path, capsys):
    model, config = golden_model(which, tmp_path), CONFIGS[which]
    shapes = {name: list(tensor.shape) for name, tensor in model.trainable_state_dict().items()}
    assert shapes == config["trainable"] and list(shapes) == list(config["trainable"])
    said = capsys.readouterr().out.splitlines()
    for line in config["printed_by_constructor"]:
        if line.startswith(("trainable params", "Do not use")):
            assert line in said
        if "Checkpoint: " in line:  # the path is another
            assert [each for each in said if each.startswith(line[: line.index(": ") + 2])]
    own = {model.release_name(name) for name in model.state_dict()}
    constants = {name for name in config["state_dict_keys"] if name.endswith("inv_freq")}
    assert own == set(config["state_dict_keys"]) - constants
    assert set(model.ln_vision.weight.tolist()) == {1} and set(model.ln_vision.bias.tolist()) == {0}
    assert model.num_image_tokens == DIMS["tokens_per_image"]


@pytest.mark.parametrize(
    "which", [which for which in FOLDERS if (GOLDEN / which / "encode_img.npz").is_file()]
)
def test_encode_img_step_by_step(models, which):
    model, golden = models(which), np.load(GOLDEN / which / "encode_img.npz")
    found, hooks = {}, []
    for name, part in (("vit_output", model.visual_encoder), ("ln_vision_output", model.ln_vision)):
        hooks.append(
            part.register_forward_hook(lambda *args, name=name: found.update({name: args[-1]}))
        )
    hooks.append(
        model.llama_proj.register_forward_hook(lambda *args: found.update({"grouped": args[1][0]}))
    )
    found["inputs_llama"], found["atts_llama"] = model.encode_img(torch.from_numpy(golden["image"]))
    for hook in hooks:
        hook.remove()
    for name, value in found.items():
        if name in golden:
            assert_close(value, golden[name], 2e-5 if name == "vit_output" else EMBEDS)


@pytest.mark.parametrize(
    "which", [which for which in FOLDERS if (GOLDEN / which / "encode_img.npz").is_file()]
)
def test_a_larger_image(which, tmp_path):
    """Positions are resampled; groups of four patches cross the ends of rows."""
    golden = np.load(GOLDEN / which / "encode_img.npz")
    if "image_big" not in golden:
        pytest.skip(f"{which}/encode_img.npz has no image_big")
    model = golden_model(which, tmp_path, image_size=golden["image_big"].shape[-1])
    vectors = model.encode_images(torch.from_numpy(golden["image_big"]))
    assert_close(vectors, golden["inputs_llama_big"], EMBEDS)
    assert model.num_image_tokens == golden["inputs_llama_big"].shape[1]


@pytest.mark.parametrize(
    "which", [which for which in FOLDERS if (GOLDEN / which / "tokenisation.json").is_file()]
)
def test_token_ids(models, which):
    model, tokens = models(which), read(f"{which}/tokenisation.json")
    for row in tokens["strings"]:
        assert (
            model.llama_tokenizer(row["text"], add_special_tokens=False).input_ids == row["ids"]
        ), row["text"]
    assert len(tokens["strings"]) > 10


def failing(end):
    """Return the folders whose failures.json has a key with that end."""
    return [
        which
        for which in FOLDERS
        if any(key.endswith(end) for key in read(f"{which}/failures.json"))
    ]


@pytest.mark.parametrize("which", failing("use_grad_checkpoint_llm"))
def test_text_alone_trains_with_checkpointing(models, which, monkeypatch):
    """The release fails, for checkpointing that re-enters needs an input with a gradient."""
    model = models(which)
    monkeypatch.setattr(model, "llm_checkpointing", True)
    model.zero_grad(set_to_none=True)
    model({"instruction_input": ["List two animals."], "answer": ["a cat and a dog"]})[
        "loss"
    ].backward()
    own = model._release_parameters()
    trained = {name for name, parameter in own.items() if parameter.grad is not None}
    assert trained == {name for name in CONFIGS[which]["trainable"] if ".lora_" in name}


@pytest.mark.parametrize("which", failing("pretraining_tp_2"))
def test_the_output_layer_is_whole_whatever_pretraining_tp_says(models, which, tmp_path):
    """The release splits it, and fails."""
    (tmp_path / "llm").mkdir()
    folder = shutil.copytree(
        llm_folder(CONFIGS[which]["llama"], tmp_path / "llm"), tmp_path / "split"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pretraining_tp": 2}))
    split, ids = golden_model(which, tmp_path, llama_model=str(folder)), torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(split.llama_model(ids).logits, models(which).llama_model(ids).logits)
