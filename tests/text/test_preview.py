"""The preview equals what the model makes of texts, in counts, labels and text, on the small model of set c."""

import pytest
import torch

from minigpt4.models import MiniGPT4
from minigpt4.text.rows import IGNORED
from minigpt4.text.templates import LLAMA2, VICUNA_V0
from tests.golden.model import CONFIG, golden_config, golden_model

LONG = "Grüße aus 東京 😀, a bus and a dog in the street, again and again."
SAMPLES = {
    "caption": {"text_input": "A dog."},
    "long caption": {"text_input": LONG},
    "instruction": {"text_input": "Red.", "instruction": "Which colour?"},
    "empty instruction": {"text_input": "Red.", "instruction": ""},
    "conversation": {"text_input": "A dog.", "turns": (("What is it?", "A dog."), ("Why?", LONG))},
}
SETTINGS = {
    "stage 1": {"end_sym": "\n", "max_txt_len": 32},
    "stage 2": {"prompt_template": VICUNA_V0.training, "end_sym": "###", "max_txt_len": 160},
    "masked end": {"prompt_template": LLAMA2.training, "end_sym": "</s>", "max_txt_len": 160},
    "learnt end": {
        "prompt_template": LLAMA2.training,
        "end_sym": "</s>",
        "max_txt_len": 160,
        "mask_eos_labels": False,
    },
    "short": {"prompt_template": VICUNA_V0.training, "end_sym": "###", "max_txt_len": 12},
}


def sizes(tokens, *kinds):
    return sum(token.size for token in tokens if token.kind in kinds)


def text(tokens, *kinds):
    return "".join(token.text for token in tokens if token.kind in kinds)


@pytest.fixture(scope="module", params=SETTINGS)
def both(request, tmp_path_factory):
    """Return (model, preview) of one `model` section."""
    folder, settings = tmp_path_factory.mktemp("model"), SETTINGS[request.param]
    if "prompt_template" in settings:
        (folder / "prompts.txt").write_text("<Img><ImageHere></Img> Describe it.\n")
        settings = settings | {"prompt_path": str(folder / "prompts.txt")}
    model = golden_model(folder, **settings)
    return model, model.text_preview(golden_config(folder, **settings))


@pytest.mark.parametrize("name", SAMPLES)
def test_counts_and_labels_are_those_of_the_model(name, both):
    model, preview = both
    sample = SAMPLES[name]
    if (sample.get("turns") or sample.get("instruction")) and not model.prompt_template:
        with pytest.raises(
            ValueError, match=r"model.prompt_template: '' cannot tell the questions"
        ):
            preview.tokens(sample, 0)
        return
    size = CONFIG["image_size"]
    picture = torch.zeros(1, 3, size, size)
    inputs, num_text = model.build_inputs(
        {"image": picture} | {key: [value] for key, value in sample.items()}
    )
    labels = inputs["labels"][0]
    tokens = preview.tokens(sample, 0)
    assert (
        sizes(tokens, "begin", "prompt", "image", "target", "given")
        == inputs["attention_mask"].sum()
    )
    assert sizes(tokens, "target", "given") == num_text
    assert sizes(tokens, "target") == (labels != IGNORED).sum()
    assert sizes(tokens, "image") == CONFIG["num_query_token"]
    behind = [token for token in tokens if token.kind in ("target", "given")]
    is_target = [token.kind == "target" for token in behind for _ in range(token.size)]
    assert is_target == (labels[-num_text:] != IGNORED).tolist()
    assert preview.lengths([sample]) == [(num_text + sizes(tokens, "cut"), sizes(tokens, "cut"))]


def test_the_text_is_the_exact_one(both):
    model, preview = both
    tokens = preview.tokens(SAMPLES["long caption"], 0)
    full = model.llama_tokenizer(LONG + model.end_sym, add_special_tokens=False).input_ids
    if len(full) > model.max_txt_len:
        assert sizes(tokens, "cut") == len(full) - model.max_txt_len
        assert text(tokens, "target") == model.llama_tokenizer.decode(full[: model.max_txt_len])
    else:
        assert not sizes(tokens, "cut")
        assert text(tokens, "target", "given") == model.llama_tokenizer.decode(full)
        assert "東京" in text(tokens, "target") and "😀" in text(tokens, "target")
    before, _, after = (
        model.prompt_list[0].partition("<ImageHere>") if model.prompt_list else ("", "", "")
    )
    assert text(tokens, "prompt") == before + after


def test_special_tokens_are_known_from_text_that_looks_like_them(both):
    model, preview = both
    tokens = preview.tokens(SAMPLES["caption"], 0)
    assert [token.text for token in tokens if token.is_special and token.kind == "begin"] == ["<s>"]
    behind = [token.text for token in tokens if token.is_special and token.kind != "begin"]
    assert behind == (["</s>"] if model.end_sym == "</s>" else [])
    (end,) = [token.kind for token in tokens if token.text == "</s>"] or [None]
    assert end == {"</s>": "given" if model.mask_eos_labels else "target"}.get(model.end_sym)


@pytest.mark.parametrize("limit", range(1, 60, 3))
def test_a_limit_within_a_character_loses_nothing(limit, tmp_path):
    settings = {"end_sym": "###", "max_txt_len": limit}
    preview = MiniGPT4.text_preview(golden_config(tmp_path, **settings))
    sample = {"text_input": "😀東京" * 4}
    ((length, num_cut),) = preview.lengths([sample])
    tokens = preview.tokens(sample, 0)
    assert (sizes(tokens, "target"), sizes(tokens, "cut")) == (length - num_cut, num_cut)
    assert text(tokens, "cut").endswith("###") or not num_cut or num_cut < 3


def test_the_tokens_of_a_long_text_are_spelt_in_linear_time(tmp_path, monkeypatch):
    preview = MiniGPT4.text_preview(golden_config(tmp_path, end_sym="###", max_txt_len=32))
    decode, num_decoded = preview.tokenizer.decode, []

    def counted(ids, **settings):
        num_decoded.append(len(ids))
        return decode(ids, **settings)

    monkeypatch.setattr(preview.tokenizer, "decode", counted)
    caption = LONG * 20
    tokens = preview.tokens({"text_input": caption}, 0)
    assert text(tokens, "target", "cut") == f"{caption}###"
    assert sum(num_decoded) < 8 * sizes(tokens, "target", "cut")


def test_prompts_are_drawn_by_the_seed(tmp_path):
    lines = [f"<Img><ImageHere></Img> Prompt {number}." for number in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    settings = {
        "prompt_template": VICUNA_V0.training,
        "end_sym": "###",
        "prompt_path": str(tmp_path / "prompts.txt"),
    }
    preview = MiniGPT4.text_preview(golden_config(tmp_path, **settings))
    drawn = [text(preview.tokens(SAMPLES["caption"], seed), "prompt") for seed in range(40)]
    assert set(drawn) == {
        VICUNA_V0.training.replace("{}", line).replace("<ImageHere>", "") for line in lines
    }
    assert drawn == [text(preview.tokens(SAMPLES["caption"], seed), "prompt") for seed in range(40)]


@pytest.mark.parametrize(
    ("end_sym", "masks", "warns"),
    [
        ("</s>", True, True),
        ("</s></s>", True, True),
        ("</s>", False, False),
        ("###</s>", True, False),
        ("###", True, False),
        ("\n", True, False),
    ],
)
def test_an_end_that_would_not_be_learnt_is_said(end_sym, masks, warns, tmp_path, caplog):
    """By the preview, so by inspect and --dry-run, and by the model, whose training warns at its start."""
    cfg = golden_config(tmp_path, end_sym=end_sym, mask_eos_labels=masks)
    MiniGPT4.text_preview(cfg)
    expected = f"model.end_sym {end_sym!r} is the end token, and would not be learnt: the model would never stop. "
    expected += (
        "Set model.mask_eos_labels=False (True is 2023's way, for an end_sym of other tokens)"
    )
    assert caplog.messages == [expected] * warns
    model = MiniGPT4.from_config(cfg, device="cpu")
    assert model.warnings() == [expected] * warns
    labels = model.rows({"text_input": ["A dog."]})[0].labels
    eos = model.llama_tokenizer.eos_token_id
    assert warns == (set(labels[-1:]) == {IGNORED}) or end_sym == "###</s>"
    assert (eos in labels) == (not masks)


@pytest.mark.parametrize("masks", [True, False])
def test_an_empty_end_is_said(masks, tmp_path, caplog):
    MiniGPT4.text_preview(golden_config(tmp_path, end_sym="", mask_eos_labels=masks))
    assert [line.split(":")[0] for line in caplog.messages] == ["model.end_sym is empty"]
