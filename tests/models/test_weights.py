"""A weight file either fits exactly, or is refused with a message that says what was found and what to do."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.models import MiniGPT4, weights
from minigpt4.models.vision.eva_vit import EvaVit
from tests.golden.model import CONFIG, FOLDER, golden_config, golden_model

VIT = load_file(FOLDER / "model/eva_vit.safetensors")
BLIP2 = load_file(FOLDER / "model/blip2.safetensors")
CHECKPOINT = load_file(FOLDER / "model/minigpt4_ckpt.safetensors")
WIDTH, HIDDEN = CHECKPOINT["llama_proj.weight"].shape
DIM, DEPTH = CONFIG["vit"]["embed_dim"], CONFIG["vit"]["depth"]
QUERIES = CONFIG["num_query_token"]
VIT_HINT = (
    "Expected the ViT eva_clip_g of the 2023 release, or dimensions in '{folder}/eva_vit.json'"
)
BLIP2_HINT = "Expected the file of BLIP-2, or its dimensions in '{folder}/blip2.json'"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("this-must-not-appear",)


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def renamed(tensors, old, new):
    return {new if key == old else key: tensor for key, tensor in tensors.items()}


def html(path):
    path.write_text("\n<!DOCTYPE html><html><body>404</body></html>")


def truncated(path):
    torch.save(VIT, path)
    path.write_bytes(path.read_bytes()[:5000])


BAD_FILES = {
    # {case: (key, content of the file, message)}
    "ViT, tensor missing": (
        "vit_ckpt",
        without(VIT, "blocks.1.mlp.fc2.bias"),
        f"does not fit: 1 tensor is missing (blocks.1.mlp.fc2.bias [{DIM}]). {VIT_HINT}",
    ),
    "ViT, tensor renamed": (
        "vit_ckpt",
        renamed(VIT, "cls_token", "class_token"),
        f"does not fit: 1 tensor is missing (cls_token [1, 1, {DIM}]); "
        f"1 tensor is unknown (class_token [1, 1, {DIM}]). {VIT_HINT}",
    ),
    "ViT, wrong shape": (
        "vit_ckpt",
        {**VIT, "blocks.0.norm1.weight": torch.ones(DIM + 1)},
        f"does not fit: 1 tensor is of another shape (blocks.0.norm1.weight is [{DIM + 1}], expected [{DIM}]). "
        + VIT_HINT,
    ),
    "ViT, two blocks too many": (
        "vit_ckpt",
        {
            **VIT,
            f"blocks.{DEPTH}.norm1.bias": torch.ones(DIM),
            f"blocks.{DEPTH + 1}.norm1.bias": torch.ones(DIM),
        },
        f"does not fit: 1 tensor is unknown (blocks.{DEPTH + 1}.norm1.bias [{DIM}]). {VIT_HINT}",
    ),
    "ViT, prefixed": (
        "vit_ckpt",
        {f"module.{name}": tensor for name, tensor in VIT.items()},
        ", ..). Its names begin with 'module.': it was saved from a wrapped model; save model.module.state_dict()",
    ),
    "ViT, empty": (
        "vit_ckpt",
        {},
        f"cls_token [1, 1, {DIM}], pos_embed {list(VIT['pos_embed'].shape)}, ",
    ),
    "ViT, a web page": (
        "vit_ckpt",
        html,
        " is an HTML page, not weights: the download went wrong. Delete it and download it again",
    ),
    "ViT, cut off": ("vit_ckpt", truncated, " is damaged or no file of torch ("),
    "ViT, a list": (
        "vit_ckpt",
        [1, 2],
        " is no file of weights (a list); expected names and tensors",
    ),
    "ViT, a sparse tensor": (
        "vit_ckpt",
        {**VIT, "cls_token": torch.zeros(1, 1, DIM).to_sparse()},
        " is no file of weights ('cls_token' in it is a Tensor); expected names and tensors",
    ),
    "ViT, a position embedding of no square": (
        "vit_ckpt",
        {**VIT, "pos_embed": torch.zeros(1, 6, DIM)},
        f"does not fit: 1 tensor is of another shape (pos_embed is [1, 6, {DIM}], expected ",
    ),
    "ViT, a position embedding of two dimensions": (
        "vit_ckpt",
        {**VIT, "pos_embed": torch.zeros(5, DIM)},
        f"does not fit: 1 tensor is of another shape (pos_embed is [5, {DIM}], expected ",
    ),
    "ViT, a position embedding without tokens": (
        "vit_ckpt",
        {**VIT, "pos_embed": torch.zeros(1, 0, DIM)},
        f"does not fit: 1 tensor is of another shape (pos_embed is [1, 0, {DIM}], expected ",
    ),
    "ViT, a tensor without a name": (
        "vit_ckpt",
        {**VIT, 3: torch.zeros(2)},
        " is no file of weights ('3' in it is a Tensor); expected names and tensors",
    ),
    "checkpoint of another type of number": (
        "ckpt",
        {"model": {name: tensor.to(torch.complex64) for name, tensor in CHECKPOINT.items()}},
        " is no file of weights ('llama_proj.bias' in it is a Tensor)",
    ),
    "ViT, a training checkpoint": (
        "vit_ckpt",
        {"model": CHECKPOINT, "epoch": 3},
        " is no file of weights ('model' in it is a dict); expected names and tensors",
    ),
    "BLIP-2, other number of queries": (
        "q_former_model",
        {"model": {**BLIP2, "query_tokens": torch.zeros(1, QUERIES + 1, HIDDEN)}},
        f"does not fit: 1 tensor is of another shape (query_tokens is [1, {QUERIES + 1}, {HIDDEN}], "
        f"expected [1, {QUERIES}, {HIDDEN}]). {BLIP2_HINT}",
    ),
    "BLIP-2, without ln_vision": (
        "q_former_model",
        {
            "model": {
                name: tensor for name, tensor in BLIP2.items() if not name.startswith("ln_vision")
            }
        },
        f"does not fit: 2 tensors are missing (ln_vision.weight [{DIM}], ln_vision.bias [{DIM}]). {BLIP2_HINT}",
    ),
    "BLIP-2, unknown tensor": (
        "q_former_model",
        {"model": {**BLIP2, "Qformer.bert.pooler.dense.bias": torch.zeros(2)}},
        f"does not fit: 1 tensor is unknown (Qformer.bert.pooler.dense.bias [2]). {BLIP2_HINT}",
    ),
    "checkpoint of a 13B": (
        "ckpt",
        {
            "model": {
                "llama_proj.weight": torch.zeros(5120, HIDDEN),
                "llama_proj.bias": torch.zeros(5120),
            }
        },
        f" was trained for a 5120-wide LLM (13B), model.llama_model is {WIDTH} wide; "
        "give a checkpoint and an LLM of one size",
    ),
    "checkpoint without bias": (
        "ckpt",
        {"model": without(CHECKPOINT, "llama_proj.bias"), "epoch": 0},
        f"does not fit: 1 tensor is missing (llama_proj.bias [{WIDTH}])",
    ),
    "checkpoint, prefixed": (
        "ckpt",
        {"model": {f"module.{name}": tensor for name, tensor in CHECKPOINT.items()}},
        f"does not fit: 2 tensors are missing (llama_proj.weight [{WIDTH}, {HIDDEN}], llama_proj.bias [{WIDTH}]); "
        f"2 tensors are unknown (module.llama_proj.bias [{WIDTH}], module.llama_proj.weight [{WIDTH}, {HIDDEN}]). "
        "Its names begin with 'module.': it was saved from a wrapped model; save model.module.state_dict()",
    ),
    "checkpoint, empty": (
        "ckpt",
        {"model": {}},
        f"does not fit: 2 tensors are missing (llama_proj.weight [{WIDTH}, {HIDDEN}], llama_proj.bias [{WIDTH}]). "
        "The file is empty",
    ),
    "checkpoint that would run code": (
        "ckpt",
        {"model": CHECKPOINT, "config": RunsCode()},
        " holds more than tensors and plain values (",
    ),
    "checkpoint of another program": (
        "ckpt",
        {"state_dict": CHECKPOINT},
        " is no file of weights ('state_dict' in it is a dict); expected names and tensors, below the key 'model'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key, content, message = BAD_FILES[case]
    cfg = golden_config(tmp_path)
    path = (
        tmp_path
        / {"vit_ckpt": "eva_vit.pth", "q_former_model": "blip2.pth", "ckpt": "checkpoint.pth"}[key]
    )
    content(path) if callable(content) else torch.save(content, path)
    cfg[key] = str(path)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))) as caught:
        MiniGPT4.from_config(cfg)
    assert str(caught.value).startswith(f"model.{key}: '{path}'")
    assert not (tmp_path / "this-must-not-appear").exists()


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x80\x02X\xff\xff\xff\xff"])
def test_files_of_anything_else(content, tmp_path):
    for path in (tmp_path / "file.pth", tmp_path / "file.safetensors"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^model.ckpt: '{path}' "):
            weights.read_tensors(path, "model.ckpt")


def test_safetensors_and_old_and_new_pth_give_the_same(tmp_path):
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    torch.save(VIT, old, _use_new_zipfile_serialization=False)
    torch.save(VIT, new)
    for path in (old, new, FOLDER / "model/eva_vit.safetensors"):
        found = weights.read_tensors(path, "model.vit_ckpt")
        assert list(found) == list(VIT)
        assert all(torch.equal(found[name], tensor) for name, tensor in VIT.items())


def test_listed_excess_is_reported_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        golden_model(tmp_path)
    reports = [
        record.getMessage() for record in caplog.records if "not used" in record.getMessage()
    ]
    path = tmp_path / "blip2.safetensors"
    assert reports == [
        f"model.q_former_model: 3 tensors of '{path}' are not used: constant of 2023's text embeddings; "
        "parts of BLIP-2 that have no use here"
    ]


SIDECARS = {
    "300,000 layers": (
        '{"embed_dim": 1, "depth": 300000, "num_heads": 1, "mlp_dim": 1, "patch_size": 1}',
        "depth 300,000",
    ),
    "an absurd width": (
        '{"embed_dim": 1000000000, "depth": 1, "num_heads": 1, "mlp_dim": 1, "patch_size": 1}',
        "embed_dim 1,000,000,000",
    ),
    "deep": ("[" * 60_000, "maximum recursion depth"),
    "300,000 entries": ("{" + ", ".join(f'"{n}": 1' for n in range(300_000)) + "}", "3,"),
    "not JSON": ("{", "Expecting property name"),
    "a field missing": ('{"embed_dim": 44}', "'depth'"),
    "an unknown field": (
        '{"embed_dim": 1, "depth": 1, "num_heads": 1, "mlp_dim": 1, "patch_size": 1, "width": 1}',
        "u",
    ),
    "text for a number": (
        '{"embed_dim": "44", "depth": 1, "num_heads": 1, "mlp_dim": 1, "patch_size": 1}',
        "unknown or",
    ),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecar_refused(case, tmp_path):
    text, reason = SIDECARS[case]
    (tmp_path / "vit.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        weights.dimensions(tmp_path / "vit.pth", EvaVit(1, 1, 1, 1, 1), "model.vit_ckpt")
    start = f"model.vit_ckpt: '{tmp_path}/vit.json', which gives the dimensions of 'vit.pth', is not usable ({reason}"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith(
        "whole numbers with embed_dim, depth, num_heads, mlp_dim, patch_size"
    )


def test_files_that_do_not_belong_together(tmp_path):
    cfg = golden_config(tmp_path)
    sidecar = tmp_path / "blip2.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"encoder_width": 99}))
    message = f"its Q-Former looks at 99-wide image tokens, the ViT of model.vit_ckpt makes {DIM}-wide ones"
    with pytest.raises(ValueError, match=rf"^model.q_former_model: {message}"):
        MiniGPT4.from_config(cfg)


def test_a_checkpoint_brings_what_another_run_trained(tmp_path):
    queries = torch.full((1, QUERIES, HIDDEN), 0.5)
    path = tmp_path / "ours.pth"
    torch.save({"model": {**CHECKPOINT, "query_tokens": queries}, "epoch": 0}, path)
    model = golden_model(tmp_path, ckpt=str(path))
    assert torch.equal(model.query_tokens, queries)
    assert torch.equal(model.llama_proj.weight, CHECKPOINT["llama_proj.weight"])


def test_resuming_needs_all_that_trains(tmp_path):
    model = golden_model(tmp_path, freeze_qformer=False)
    state = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    assert {"query_tokens", "Qformer.bert.embeddings.LayerNorm.weight", "llama_proj.bias"} <= set(
        state
    )
    model.load_trainable(
        {name: tensor + 1 for name, tensor in state.items()}, "run.resume_ckpt_path"
    )
    assert all(
        torch.equal(found, state[name] + 1) for name, found in model.trainable_state_dict().items()
    )
    message = (
        r"^run.resume_ckpt_path: 'checkpoint' does not fit: \d+ tensors are missing \(query_tokens "
    )
    with pytest.raises(CheckpointError, match=message):
        model.load_trainable(CHECKPOINT, "run.resume_ckpt_path")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_changing_a_mapped_tensor_leaves_the_file_alone(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch.save(CHECKPOINT, path) if suffix == ".pth" else save_file(CHECKPOINT, path)
    before = path.read_bytes()
    tensors = weights.read_tensors(path, "model.ckpt")
    tensors["llama_proj.weight"].fill_(3)
    assert path.read_bytes() == before


def trained_with(path, **identity):
    """Write a checkpoint with this identity; return its path as text."""
    torch.save({"model": CHECKPOINT, "progress": {"identity": identity}}, path)
    return str(path)


def test_a_checkpoint_knows_the_frozen_files_it_was_trained_with(tmp_path, caplog):
    mine = golden_model(tmp_path).identity()
    assert {key: list(found) for key, found in mine["vision"].items()} == {
        "vit_ckpt": ["name", "fingerprint"],
        "q_former_model": ["name", "fingerprint"],
    }
    save_file({name: 0.9 * tensor for name, tensor in VIT.items()}, tmp_path / "tuned.safetensors")
    (tmp_path / "tuned.json").write_text((tmp_path / "eva_vit.json").read_text())
    tuned, ckpt = str(tmp_path / "tuned.safetensors"), trained_with(tmp_path / "ours.pth", **mine)
    golden_model(tmp_path, ckpt=ckpt)
    assert "was trained with" not in caplog.text
    model = golden_model(tmp_path, ckpt=ckpt, vit_ckpt=tuned)
    fingerprint = mine["vision"]["vit_ckpt"]["fingerprint"]
    words = f"'{ckpt}' was trained with another vit_ckpt file (name eva_vit.safetensors, fingerprint {fingerprint}) than"
    assert f"{words} model.vit_ckpt (name tuned.safetensors, fingerprint " in caplog.text
    assert caplog.text.count("was trained with another") == 1
    assert mine["vision"]["q_former_model"] == model.identity()["vision"]["q_former_model"]
    # a ViT that trains is in the checkpoint, so its original file no longer matters
    trains = golden_model(tmp_path, ckpt=ckpt, vit_ckpt=tuned, freeze_vit=False)
    assert list(trains.identity()["vision"]) == ["q_former_model"]
    assert caplog.text.count("was trained with another") == 1


@pytest.mark.parametrize(
    "progress", [[1], {"identity": 3}, {"identity": {"llm": "x", "vision": [2]}}, {}, None]
)
def test_what_another_program_says_of_a_checkpoint_is_not_taken_for_ours(
    progress, tmp_path, caplog
):
    torch.save({"model": CHECKPOINT, "progress": progress}, tmp_path / "other.pth")
    golden_model(tmp_path, ckpt=str(tmp_path / "other.pth"))
    assert "was trained with" not in caplog.text


@pytest.mark.parametrize("key", ["vit_ckpt", "q_former_model", "ckpt"])
def test_one_flipped_bit_is_found_in_any_source(key, tmp_path):
    """By the checksums of a .pth file; in a file without them, by the absurd number that a bit of the exponent makes."""
    cfg = golden_config(tmp_path)
    tensors = {"vit_ckpt": VIT, "q_former_model": BLIP2, "ckpt": CHECKPOINT}[key]
    name = next(
        name
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and tensor.dtype == torch.float32
    )
    flat = tensors[name].clone().flatten()
    index = int(flat.abs().argmin() if flat.abs().min() else flat.abs().argmax())
    flat.view(torch.int32)[index] ^= 1 << 30
    assert flat[index].isfinite() and abs(flat[index]) > 1e8
    save_file({**tensors, name: flat.view_as(tensors[name])}, tmp_path / "flipped.safetensors")
    whole = tmp_path / "whole.pth"
    torch.save(tensors, whole)
    content = whole.read_bytes()
    where = content.index(tensors[name].numpy().tobytes()[:64]) + 5
    (tmp_path / "flipped.pth").write_bytes(
        content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]
    )
    for stem, sidecar in (("eva_vit", "vit_ckpt"), ("blip2", "q_former_model")):
        if sidecar == key:
            (tmp_path / "flipped.json").write_text((tmp_path / f"{stem}.json").read_text())
    for suffix, message in (
        (".safetensors", r"holds numbers above 1e\+08"),
        (".pth", "is damaged .*another checksum"),
    ):
        cfg[key] = str(tmp_path / f"flipped{suffix}")
        with pytest.raises(CheckpointError, match=rf"^model.{key}: '{cfg[key]}' {message}"):
            MiniGPT4.from_config(cfg)
