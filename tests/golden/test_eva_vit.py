"""The ViT gives the activations of the 2023 release (golden set a), also at other picture sizes."""

import json

import numpy as np
import pytest
import torch

from minigpt4.models.vision.eva_vit import EvaVit, half_linears
from tests.golden import GOLDEN
from tests.golden.model import vit_fields

FOLDER = GOLDEN / "a_eva_vit"
DESCRIPTION = json.loads((FOLDER / "config.json").read_text())
DIMS = EvaVit(**vit_fields(DESCRIPTION))
CASES = DESCRIPTION["cases"]
ATOL = (
    3e-5  # float32 noise: 7.5e-6 against float64, 5.7e-6 between torch versions, of values up to 12
)


def load(image_size):
    vit = DIMS.build(image_size)
    DIMS.load(vit, FOLDER / "checkpoint.safetensors", "model.vit_ckpt")
    return vit.eval()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
@torch.no_grad()
def test_activations(case, capsys):
    expected = np.load(FOLDER / case["file"])
    vit, blocks, patches = load(case["img_size"]), [], []
    assert capsys.readouterr().out.strip() == case["printed"]
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    vit.patch_embed.register_forward_hook(lambda module, args, output: patches.append(output))
    output = vit(torch.from_numpy(expected["image"]))
    for found, name in (
        (patches[0], "patch_embed"),
        (vit.pos_embed, "pos_embed"),
        (torch.stack(blocks), "block_outputs"),
        (output, "output"),
    ):
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=0, atol=ATOL, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_names_shapes_and_types(precision):
    vit = DIMS.build(DESCRIPTION["checkpoint_img_size"])
    if precision == "fp16":
        half_linears(vit, torch.float16)
    found = {
        name: (list(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in vit.state_dict().items()
    }
    keys = DESCRIPTION["model_keys"]
    assert found == {
        name: (key["shape"], key[f"dtype_precision_{precision}"]) for name, key in keys.items()
    }


def test_stochastic_depth_rises_linearly():
    vit = DIMS.build(DESCRIPTION["checkpoint_img_size"], drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in vit.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.4, DIMS.depth))


def test_picture_size_must_be_whole_patches():
    with pytest.raises(
        ValueError, match=r"^model.image_size: 225 is no multiple of the ViT's patch size 14$"
    ):
        DIMS.build(225)
