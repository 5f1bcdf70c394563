"""SigLIP without a bridge, exported as Llava, with a linear and with a two-layer projector."""

import filecmp

import pytest
import torch

import minigpt4
from minigpt4.export import main
from minigpt4.exporting.hf import dtype_of
from minigpt4.exporting.opening import open_config, open_model
from tests.exporting.conftest import CFG_PATH
from tests.exporting.prompts import largest_difference
from tests.models import tiny_parts
from tests.small_release import picture


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """Return the --options of a SigLIP tower with Qwen 3, without a checkpoint."""
    root = tmp_path_factory.mktemp("siglip")
    model = {
        "vision_model": tiny_parts.write_tower(root, "siglip"),
        "llama_model": tiny_parts.write_llm(root, "qwen3"),
    }
    model |= {"bridge": "none", "check_llm": False, "low_resource": False, "llm_precision": "fp32"}
    return [f"model.{key}={value}" for key, value in model.items()] + ["run.device=cpu"]


def exported(checkpoint, options, root):
    """Export a checkpoint and check its import; return (chat, its conversation, model and processor of transformers)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    command = [str(checkpoint), "--cfg-path", CFG_PATH, "--options", *options]
    assert main([*command, "--to", "checkpoint", str(root / "own")]) == 0
    assert main([str(root / "own"), "--to", "hf", str(root / "hf")]) == 0
    assert main([str(root / "hf"), "--to", "checkpoint", str(root / "again")]) == 0
    names = [path.name for path in (root / "own").iterdir()]
    assert filecmp.cmpfiles(root / "own", root / "again", names, shallow=False)[0] == names
    model = AutoModelForImageTextToText.from_pretrained(
        root / "hf", attn_implementation="eager"
    ).eval()
    chat, template = minigpt4.load(str(root / "own"), ["run.device=cpu"])
    return chat, template, model, AutoProcessor.from_pretrained(root / "hf", backend="pil")


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_siglip_with_either_projector(siglip, tmp_path, projector):
    generator = torch.Generator().manual_seed(5)
    shapes = {"weight": (32, 32), "bias": (32,)}
    layers = ["llama_proj"] if projector == "linear" else ["llama_proj.0", "llama_proj.2"]
    state = {
        f"{name}.{kind}": torch.randn(shapes[kind], generator=generator)
        for name in layers
        for kind in shapes
    }
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    options = [*siglip, f"model.projector={projector}"]
    chat, template, model, processor = exported(tmp_path / "checkpoint.pth", options, tmp_path)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert (
        largest_difference(
            chat, template, model, processor, [picture(number) for number in range(5)]
        )
        < 1e-5
    )


def write_checkpoint(path, options, part=None, dtype=torch.float32):
    """Write a checkpoint in which the projection, and a part if one is named, were trained; return its --options."""
    options = [*options, *([f"model.train.{part}=full"] if part else [])]
    state = {"llama_proj.weight": torch.randn(32, 32), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": state}, path)
    if part:
        model, _ = open_model(open_config(str(path), CFG_PATH, options))
        found = model.trainable_state_dict()
        state = {name: (tensor + 0.1).to(dtype) for name, tensor in found.items()}
        torch.save({"model": state}, path)
    return options


@pytest.mark.parametrize(
    ("part", "dtype"),
    [("vision", torch.float32), ("llm", torch.float32), ("llm", torch.float16)],
)
def test_every_part_that_trained_comes_back_bit_for_bit(siglip, tmp_path, part, dtype):
    options = write_checkpoint(tmp_path / "checkpoint.pth", siglip, part, dtype)
    exported(tmp_path / "checkpoint.pth", options, tmp_path)


def test_weights_of_the_llm_in_a_checkpoint_keep_their_values(siglip, tmp_path, capsys):
    """Those of an earlier stage, after which the LLM is frozen; the LLM's own files are in 16 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, folder = tmp_path / "checkpoint.pth", tmp_path / "llm"
    write_checkpoint(path, siglip, "llm")
    source = siglip[1].removeprefix("model.llama_model=")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    options = [*siglip, f"model.llama_model={folder}", "model.llm_precision=auto"]
    cfg = open_config(str(path), CFG_PATH, options)
    own, saved = open_model(cfg)[0].state_dict(), torch.load(path, weights_only=True)["model"]
    assert len(saved) > 20 and all(torch.equal(own[name], saved[name]) for name in saved)
    assert dtype_of(cfg.model_cfg) == "float32"
    command = [str(path), "--cfg-path", CFG_PATH, "--options", *options]
    assert main([*command, "--to", "gguf", str(tmp_path / "gguf")]) == 1
    assert "holds weights of the LLM, which go into no projector file" in capsys.readouterr().err
    # a checkpoint of the projection alone leaves the LLM as it is
    write_checkpoint(path, siglip)
    assert open_model(cfg)[0].llama_model.dtype == torch.bfloat16
    assert dtype_of(cfg.model_cfg) == "bfloat16"


def test_images_of_another_size_and_a_repetition_penalty(siglip, tmp_path):
    options = [*siglip, "model.image_size=42", "model.repetition_penalty=1.2"]
    write_checkpoint(tmp_path / "checkpoint.pth", options)
    chat, template, model, processor = exported(tmp_path / "checkpoint.pth", options, tmp_path)
    images = [picture(number) for number in range(5)]
    assert largest_difference(chat, template, model, processor, images) < 1e-5
    assert model.config.vision_config.image_size == 42
    assert model.generation_config.repetition_penalty == 1.2
    card = (tmp_path / "hf/README.md").read_text()
    assert "the tower's epsilon (SigLIP: 1e-6) instead of 1e-5" in card
    assert "`repetition_penalty` 1.2 also counts the prompt's tokens" in card


def test_a_tower_that_trained_at_another_size_says_that_there_is_no_way_back(
    siglip, tmp_path, capsys
):
    path = tmp_path / "checkpoint.pth"
    options = write_checkpoint(path, [*siglip, "model.image_size=42"], "vision")
    command = [str(path), "--cfg-path", CFG_PATH, "--options", *options]
    assert main([*command, "--to", "hf", str(tmp_path / "hf")]) == 0
    reason = "position embeddings were resampled"
    assert reason in (tmp_path / "hf/README.md").read_text()
    assert main([str(tmp_path / "hf"), "--to", "checkpoint", str(tmp_path / "again")]) == 1
    assert reason in capsys.readouterr().err


def test_clip_is_refused_by_name(siglip, tmp_path, capsys):
    state = {"llama_proj.weight": torch.zeros(32, 32), "llama_proj.bias": torch.zeros(32)}
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    options = [*siglip, f"model.vision_model={tiny_parts.write_tower(tmp_path, 'clip')}"]
    command = [
        str(tmp_path / "checkpoint.pth"),
        "--cfg-path",
        CFG_PATH,
        "--to",
        "hf",
        str(tmp_path / "hf"),
    ]
    assert main([*command, "--options", *options]) == 1
    error = capsys.readouterr().err
    assert (
        "no class of transformers has the tower" in error
        and "Llava has SigLIP and no bridge" in error
    )
