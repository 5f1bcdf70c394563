"""A small MiniGPT-v2 that has learnt a few answers with boxes by heart, as files that demo.py reads."""

import shutil

import torch
from safetensors.torch import save_file

from tests.golden_v2 import GOLDEN
from tests.golden_v2.model import DIMS, golden_model, write_vit

IMAGE = "<Img><ImageHere></Img> "
GROUNDED = "<p>a red circle</p> {<8><10><38><40>} near <p>stars</p> {<50><20><60><30>}<delim>{<70><60><104><90>}"
ANSWERS = {  # question -> answer; `!@#` stands between turns
    f"{IMAGE}[grounding] describe this image in detail": GROUNDED,
    f"{IMAGE}[grounding] describe this image in detail!@#[refer] stars": f"{GROUNDED}!@#{{<50><20><60><30>}}",
    f"{IMAGE}[identify] what is this {{<20><30><60><70>}}": "a circle",
}


def write_small_v2(root, answers=ANSWERS):
    """Write ViT, LLM and checkpoint below `root`; return the `--options` that name them."""
    settings = {
        "lora_r": 0,
        "ckpt": "",
        "chat_template": True,
        "end_sym": "</s>",
        "max_txt_len": 300,
    }
    model = golden_model("b_minigpt_v2", root, **settings)
    teach(model, answers)
    shutil.copytree(GOLDEN / "model/llama", root / "llama")
    llm = {name: tensor.contiguous() for name, tensor in model.llama_model.state_dict().items()}
    save_file(llm, root / "llama" / "model.safetensors")
    projection = {
        f"llama_proj.{name}": tensor for name, tensor in model.llama_proj.state_dict().items()
    }
    torch.save({"model": projection}, root / "v2.pth")
    options = {
        "model.vit_ckpt": write_vit(root),
        "model.llama_model": root / "llama",
        "model.ckpt": root / "v2.pth",
        "model.image_size": DIMS["image_size"],
        "model.lora_r": 0,
        "model.low_resource": False,
        "model.llm_precision": "fp32",
        "model.vit_precision": "fp32",
        "model.check_llm": False,  # it knows nothing but its answers
        "datasets.cc_sbu_align.vis_processor.train.image_size": DIMS["image_size"],
        "run.device": "cpu",
        "env.cache_root": root / "cache",
    }
    return ["--options", *(f"{key}={value}" for key, value in options.items())]


def teach(model, answers, steps=40):
    """Train LLM and projection on `answers`, whatever the image, until they are known."""
    generator = torch.Generator().manual_seed(0)
    model.llama_model.requires_grad_(True)
    size, count = DIMS["image_size"], len(answers)
    turns = {
        "conv_q": list(answers),
        "conv_a": list(answers.values()),
        "connect_sym": ["!@#"] * count,
    }
    optimizer = torch.optim.Adam(
        [*model.llama_model.parameters(), *model.llama_proj.parameters()], lr=5e-3
    )
    for _ in range(steps):
        image = torch.randn(count, 3, size, size, generator=generator)
        loss = model({"image": image, **turns})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
