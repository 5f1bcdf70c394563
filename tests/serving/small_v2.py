"""A small MiniGPT-v2 that has learnt a few answers with boxes by heart, as files that demo.py reads."""

import shutil

import torch
from safetensors.torch import save_file

from tests.golden_v2 import GOLDEN
from tests.golden_v2.model import DIMS, golden_model, write_vit

IMAGE = "<Img><ImageHere></Img> "
GROUNDED = "<p>a red circle</p> {<8><10><38><40>} near <p>stars</p> {<50><20><60><30>}<delim>{<70><60><104><90>}"
ANSWERS = {  # question -> answer, one of them to a second question
    f"{IMAGE}[grounding] describe this image in detail": GROUNDED,
    f"{IMAGE}[grounding] describe this image in detail!@#[refer] stars": f"{GROUNDED}!@#{{<50><20><60><30>}}",
    f"{IMAGE}[vqa] what is it?": "a circle",
}


def write_small_v2(root):
    """Write ViT, LLM and checkpoint below `root`; return the `--options` that name them."""
    (root / "taught").mkdir()
    model = golden_model("b_minigpt_v2", root, lora_r=0, ckpt="", chat_template=True, end_sym="</s>", max_txt_len=200)
    teach(model)
    shutil.copytree(GOLDEN / "model/llama", root / "llama")
    llm = {name: tensor.contiguous() for name, tensor in model.llama_model.state_dict().items()}
    save_file(llm, root / "llama" / "model.safetensors")
    torch.save({"model": {f"llama_proj.{k}": v for k, v in model.llama_proj.state_dict().items()}}, root / "v2.pth")
    settings = {
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
    return ["--options", *(f"{key}={value}" for key, value in settings.items())]


def teach(model, steps=40):
    """Train LLM and projection on ANSWERS, each about an image of its own noise, until they are known."""
    generator = torch.Generator().manual_seed(0)
    model.llama_model.requires_grad_(True)
    size, count = DIMS["image_size"], len(ANSWERS)
    turns = {"conv_q": list(ANSWERS), "conv_a": list(ANSWERS.values()), "connect_sym": ["!@#"] * count}
    optimizer = torch.optim.Adam([*model.llama_model.parameters(), *model.llama_proj.parameters()], lr=5e-3)
    for _ in range(steps):
        image = torch.randn(count, 3, size, size, generator=generator)
        loss = model({"image": image, **turns})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02  # measured after 40 steps: LOSS
