"""SigLIP without a bridge, exported as Llava, with a linear and with a two-layer projector."""

import filecmp

import pytest
import torch

import minigpt4
from minigpt4.export import main
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
