"""At real size, on the meta device, names and shapes are those of the released files (golden set i)."""

import json
import math
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from minigpt4.models import MiniGPT4, weights
from minigpt4.models.vision.qformer import to_release_name
from tests.golden import GOLDEN

FOLDER = GOLDEN / "i_manifest"
# buffers of 2023's networks that the same networks of today's libraries do not have
BUFFERS = ("position_ids", "inv_freq")


def manifest(pattern):
    """Return what the one file of that name holds, which may name the size of the set's LLM; skip the test without."""
    for path in FOLDER.glob(pattern):
        return json.loads(path.read_text())
    pytest.skip(f"this set of fixtures has no i_manifest/{pattern}")


def shapes(keys):
    return {name: key["shape"] for name, key in keys.items() if not name.endswith(BUFFERS)}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The default configuration, all files of weights absent, with a 7B LLM's config.json and any tokenizer."""
    folder = tmp_path_factory.mktemp("vicuna")
    llama = manifest("full_model_state_dict_*.json")["llama_config"] | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(llama))
    for file in (GOLDEN / "c_minigpt4/model/llama").glob("*token*"):
        shutil.copy(file, folder)
    absent = str(folder / "absent.pth")
    section = {
        "llama_model": str(folder),
        "vit_ckpt": absent,
        "q_former_model": absent,
        "llm_precision": "fp16",
    }
    return OmegaConf.merge(OmegaConf.structured(MiniGPT4.Config), section)


@pytest.fixture(scope="module")
def model(config):
    return MiniGPT4.skeleton(config, torch.float16)


def own_tensors(model, *prefixes):
    tensors = {to_release_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def test_vit_file(model):
    found = {name: list(tensor.shape) for name, tensor in model.visual_encoder.state_dict().items()}
    released = manifest("eva_vit_g.json")
    assert found == shapes(released["keys"])
    assert sum(p.numel() for p in model.visual_encoder.parameters()) == released["parameters"]


def test_blip2_file(model):
    found = own_tensors(model, "query_tokens", "ln_vision.", "Qformer.")
    released = manifest("blip2_pretrained_flant5xxl.json")["keys"]
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes(released)


def test_whole_model(model):
    found = own_tensors(model, "")
    released = manifest("full_model_state_dict_*.json")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes(released["keys"])
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in found.items()}
    assert types == {name: key["dtype"] for name, key in released["keys"].items() if name in found}
    assert sum(tensor.numel() for tensor in model.parameters()) == released["parameters"]


def test_checkpoint(model):
    released = manifest("minigpt4_checkpoint_*.json")
    found = {name: list(tensor.shape) for name, tensor in model.trainable_state_dict().items()}
    assert found == released["trainable_parameters"]
    state = {
        name: torch.empty(key["shape"], device="meta")
        for name, key in released["model_keys"].items()
    }
    taken = weights.match(
        state, model.trainable_state_dict(), "model.ckpt", "file", weights.CHECKPOINT_EXCESS
    )
    assert list(taken) == list(found)


def size_of(keys):
    """Return how many numbers the tensors of a manifest hold, {name: shape}."""
    return sum(math.prod(shape) for shape in keys.values())


def llm_shapes():
    keys = shapes(manifest("full_model_state_dict_*.json")["keys"])
    return {name: shape for name, shape in keys.items() if name.startswith("llama_model.")}


def test_plan(config):
    rows = {row.name: row for row in MiniGPT4.plan(config, "cpu")}
    assert list(rows) == [
        "query_tokens",
        "visual_encoder",
        "ln_vision",
        "Qformer",
        "llama_model",
        "llama_proj",
    ]
    assert (
        sum(row.parameters for row in rows.values())
        == manifest("full_model_state_dict_*.json")["parameters"]
    )
    assert [row.name for row in rows.values() if row.trainable] == ["llama_proj"]
    assert rows["llama_proj"].trainable == size_of(
        manifest("minigpt4_checkpoint_*.json")["trainable_parameters"]
    )
    assert (rows["llama_model"].dtype, rows["llama_model"].bytes) == (
        "float16",
        2 * size_of(llm_shapes()),
    )
    assert rows["visual_encoder"].dtype == "float16/float32"


def test_plan_in_8_bit(config):
    config = OmegaConf.merge(config, {"low_resource": True})
    llm = next(row for row in MiniGPT4.plan(config, "cuda") if row.name == "llama_model")
    # 16 bits for what is not quantised, and a scale for each output of what is
    kept = {
        name: shape for name, shape in llm_shapes().items() if not name.endswith("_proj.weight")
    }
    scales = {name: shape[:1] for name, shape in llm_shapes().items() if name not in kept}
    assert llm.parameters == size_of(llm_shapes())
    assert llm.bytes == llm.parameters + size_of(kept) + 2 * size_of(scales)
    assert (llm.dtype, llm.device) == ("float16/int8", "cuda")
