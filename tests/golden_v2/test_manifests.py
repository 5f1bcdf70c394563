"""At real size, on the meta device, names and shapes are those of the newest release's files (set i)."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from minigpt4.common.registry import registry
from minigpt4.models import weights
from minigpt4.models.llm import adapters
from tests.golden_v2 import GOLDEN, needs, read
from tests.golden_v2.model import PACKAGE

pytestmark = needs("i_manifest/patterns.json")
MODELS = read("i_manifest/patterns.json", {"models": {}})["models"]
SAVED = sorted(path.name for path in GOLDEN.glob("i_manifest/*_checkpoint.json"))
CONSTANTS = "inv_freq"  # the release saves them; networks of today's libraries have none


def type_of(names):
    """Return arch and type of the model that has tensors of these names."""
    return (
        ("minigpt_v2", "pretrain")
        if any(".lora_" in name for name in names)
        else ("minigpt4", "pretrain_llama2")
    )


def llama_config():
    """Return the config.json of the LLM, read off the shapes of its tensors."""
    tensors = next(iter(MODELS.values()))["state_dict_patterns"]

    def shape(end):
        return next(value["shape"] for name, value in tensors.items() if name.endswith(end))

    vocabulary, width = shape("embed_tokens.weight")
    (half_head,) = shape(CONSTANTS)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": shape("mlp.up_proj.weight")[0],
        "num_hidden_layers": next(
            v["count"] for name, v in tensors.items() if name.endswith("mlp.up_proj.weight")
        ),
        "num_attention_heads": width // (2 * half_head),
        "vocab_size": vocabulary,
    }


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """Return a function of a model's arch and type that gives it at its default size, without weights."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(llama_config()))
    for file in (GOLDEN / "model/llama").glob("*token*"):
        shutil.copy(file, folder)

    def skeleton(arch, model_type):
        model_class = registry.get_model_class(arch)
        defaults = OmegaConf.load(
            PACKAGE / model_class.PRETRAINED_MODEL_CONFIG_DICT[model_type]
        ).model
        paths = dict.fromkeys(("vit_ckpt", "q_former_model"), str(folder / "absent.pth")) | {
            "llama_model": str(folder)
        }
        cfg = OmegaConf.merge(OmegaConf.structured(model_class.Config), defaults, paths)
        return model_class.skeleton(cfg, torch.float16)

    return skeleton


@pytest.mark.parametrize("name", SAVED)
def test_checkpoints(skeletons, name):
    """What the release saves is what we save, constants aside; and we take all of it."""
    released = read(f"i_manifest/{name}")
    own = skeletons(*type_of(released)).trainable_state_dict()
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in own.items()
    }
    assert found == {key: value for key, value in released.items() if not key.endswith(CONSTANTS)}
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in released.items()}
    taken = weights.match(state, own, "model.ckpt", "file", weights.CHECKPOINT_EXCESS)
    assert taken.keys() == found.keys()


@pytest.mark.parametrize(
    "version",
    read("i_manifest/newer_peft.json", {"versions": []})["versions"],
    ids=lambda version: version["peft"],
)
def test_newer_versions_of_peft(skeletons, version):
    """Their names of what trains, expanded over the layers, become the release's."""
    own, state = skeletons("minigpt_v2", "pretrain").trainable_state_dict(), {}
    for pattern, key in version["saved_checkpoint_patterns"].items():
        for layer in range(key["count"]):
            state[pattern.replace("{i}", str(layer))] = torch.empty(key["shape"], device="meta")
    renamed = adapters.in_release_names(state)
    taken = weights.match(renamed, own, "model.ckpt", version["peft"], weights.CHECKPOINT_EXCESS)
    assert taken.keys() == own.keys()


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(skeletons, name, capsys):
    """Every tensor of the release's model has its name and shape here, and what trains has its type."""
    released = MODELS[name]
    model = skeletons(*type_of(released["state_dict_patterns"]))
    patterns = {
        key: value
        for key, value in released["state_dict_patterns"].items()
        if not key.endswith(CONSTANTS)
    }
    expected = {}
    for pattern, value in patterns.items():
        for number in range(value["count"]):
            expected[pattern.replace("{i}", str(number))] = value["shape"]
    found = {
        model.release_name(key): list(tensor.shape) for key, tensor in model.state_dict().items()
    }
    assert found == expected
    assert (
        sum(tensor.numel() for tensor in model.trainable_state_dict().values())
        == released["trainable_elements"]
    )
    said = capsys.readouterr().out
    for line in released["printed"]:
        assert not line.startswith("trainable params") or line in said
