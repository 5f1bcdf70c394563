"""The file for llama.cpp, read with the gguf package: its tensors and settings give the output of our model."""

import json

import pytest
import torch

from minigpt4.conversation.conversation import Conversation, template_for
from minigpt4.export import main
from minigpt4.exporting.opening import open_config, open_model
from minigpt4.models.llm.language_model import load_tokenizer
from minigpt4.text.segments import IMAGE_SLOT
from tests.exporting.conftest import CFG_PATH
from tests.exporting.prompts import our_conversation, user
from tests.models import tiny_parts


def norm(x, tensors, name, eps):
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps
    )


def linear(x, tensors, name):
    return torch.nn.functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def llava_graph(pixels, tensors, fields):
    """Return the vectors [N, D] that llama.cpp's graph for the projector `mlp` computes."""
    heads = fields["clip.vision.attention.head_count"]
    eps = fields["clip.vision.attention.layer_norm_epsilon"]
    patch, bias = tensors["v.patch_embd.weight"], tensors.get("v.patch_embd.bias")
    x = (
        torch.nn.functional.conv2d(
            pixels[None], patch, bias, stride=fields["clip.vision.patch_size"]
        )[0]
        .flatten(1)
        .T
    )
    if "v.class_embd" in tensors:
        x = torch.cat([tensors["v.class_embd"][None], x])
    x = x + tensors["v.position_embd.weight"]
    if "v.pre_ln.weight" in tensors:
        x = norm(x, tensors, "v.pre_ln", eps)
    for block in range(fields["clip.vision.block_count"] - 1):  # the last one is not computed
        name = f"v.blk.{block}"
        y = norm(x, tensors, f"{name}.ln1", eps)
        qkv = [
            linear(y, tensors, f"{name}.attn_{kind}").unflatten(1, (heads, -1)).transpose(0, 1)
            for kind in "qkv"
        ]
        y = torch.nn.functional.scaled_dot_product_attention(*qkv).transpose(0, 1).flatten(1)
        x = x + linear(y, tensors, f"{name}.attn_out")
        y = linear(norm(x, tensors, f"{name}.ln2", eps), tensors, f"{name}.ffn_up")
        y = (
            torch.nn.functional.gelu(y, approximate="tanh")
            if "clip.use_gelu" in fields
            else y * (1.702 * y).sigmoid()
        )
        x = x + linear(y, tensors, f"{name}.ffn_down")
    x = norm(x, tensors, "v.post_ln", eps)
    x = x[1:] if "v.class_embd" in tensors else x
    return linear(
        torch.nn.functional.gelu(linear(x, tensors, "mm.0"), approximate="tanh"), tensors, "mm.2"
    )


def check_template(template, llm):
    """Assert that a message as llama-server joins it, image between texts, gives the prompt of our chat."""
    template_of_ours = template_for("###Human: {} ###Assistant: ", "###")
    conv, _ = our_conversation(Conversation(template_of_ours), [user(0, "What?")])
    prompt = "".join(map(str, conv.segments()))
    messages = [{"role": "user", "content": f"<Img>{IMAGE_SLOT}</Img> What?"}]
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    assert load_tokenizer(llm).apply_chat_template(messages, **options) == prompt


@pytest.mark.parametrize(
    ("tower", "size"), [("clip", tiny_parts.SIZE), ("siglip", tiny_parts.SIZE), ("clip", 42)]
)
def test_the_file_gives_the_output_of_the_model(tower, size, tmp_path):
    from gguf import GGUFReader

    tiny_parts.write_llm(tmp_path, "qwen3")
    model = {
        "vision_model": tiny_parts.write_tower(tmp_path, tower),
        "llama_model": tmp_path / "qwen3",
    }
    model |= {"bridge": "none", "low_resource": False, "llm_precision": "fp32", "image_size": size}
    options = [f"model.{key}={value}" for key, value in model.items()]
    state = {"llama_proj.weight": torch.randn(32, 32), "llama_proj.bias": torch.randn(32)}
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    command = [str(tmp_path / "checkpoint.pth"), "--cfg-path", CFG_PATH, "--options", *options]
    assert main([*command, "--to", "gguf", str(tmp_path / "out"), "--license", "MIT"]) == 0
    assert json.loads((tmp_path / "out/minigpt4/manifest.json").read_text())["licence"] == "MIT"
    check_template((tmp_path / "out/chat_template.jinja").read_text(), tmp_path / "qwen3")
    reader = GGUFReader(tmp_path / "out/mmproj.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert fields["general.architecture"] == "clip" and fields["clip.projector_type"] == "mlp"
    assert fields["clip.vision.image_mean"] == pytest.approx(tiny_parts.MEAN)
    own, _ = open_model(open_config(str(tmp_path / "checkpoint.pth"), CFG_PATH, options))
    pixels = torch.randn(3, size, size)
    with torch.no_grad():
        ours = own.encode_images(pixels[None])[0]
    theirs = llava_graph(pixels, tensors, fields)
    # SigLIP's norms have an epsilon of 1e-6, our ln_vision after it 1e-5.
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_a_q_former_is_refused_by_name(folders, tmp_path, capsys):
    assert main([str(folders.checkpoint), "--to", "gguf", str(tmp_path / "out")]) == 1
    assert (
        "llama.cpp has no projector for this model (bridge qformer, tower eva_clip_g)"
        in capsys.readouterr().err
    )
