"""Wrong inputs for the newest release's models and data: each has one exact message, before anything is lost.

In a message <size>, <rank>, <width> (of the LLM), <vision> (of merged patches) and <half> (of the LoRA tensors) are
replaced by the numbers of the golden model; DIR is the folder of the test.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.models.mini_gpt4_config import find_problems
from tests.datasets.instruction_files import ROWS, build, preflight, write_images, write_json
from tests.golden import model as golden_2023
from tests.golden_v2.model import LLAMA2, V2, checkpoint_of, golden_config, golden_model

IMAGE = "<Img><ImageHere></Img> "


@dataclass
class World:
    """The small MiniGPT-v2, and a folder for wrong files."""

    model: torch.nn.Module
    folder: Path

    def images(self, *shape):
        return torch.zeros(*shape, 3, self.model.image_size, self.model.image_size)

    def load(self, state, name=V2, **settings):
        """Load a golden model from a checkpoint that holds `state`."""
        save_file(state, self.folder / "wrong.safetensors")
        golden_model(name, self.folder, ckpt=str(self.folder / "wrong.safetensors"), **settings)

    def load_changed(self, change):
        state = load_file(checkpoint_of(V2))
        change(state, sorted(name for name in state if ".lora_" in name))
        self.load(state)

    def projection(self, width=None, vision=None):
        """Return a checkpoint of only the projection, for an LLM and a bridge of these widths."""
        own = self.model.llama_proj.weight
        width, vision = width or own.shape[0], vision or own.shape[1]
        return {
            "llama_proj.weight": torch.zeros(width, vision),
            "llama_proj.bias": torch.zeros(width),
        }

    def load_2023(self, state):
        save_file(state, self.folder / "wrong.safetensors")
        golden_2023.golden_model(self.folder, ckpt=str(self.folder / "wrong.safetensors"))

    def configure(self, **changes):
        problems = find_problems(golden_config(V2, self.folder, **changes), "model")
        raise ValueError("\n".join(map(str, problems)))

    def annotated(self, name, *rows):
        """Read a dataset of these records; raise ValueError with what is wrong with it, or with the last record."""
        write_images(self.folder / "coco")
        path = write_json(self.folder / "a.json", rows)
        info = {"ann_path": str(path), "image_path": f"{self.folder}/coco"}
        raise ValueError(
            "\n".join(preflight(name, info)) or build(name, info)["train"].annotation[-1].detail
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden_model(V2, tmp_path_factory.mktemp("v2"), chat_template=True, end_sym="</s>")


SEVERAL = "the text of 1 of the batch's 2 samples cannot be read ({}). Correct or remove them, or let the dataset skip "
SEVERAL += "them: docs/custom_data.md"
TWO = {"answer": ["c", "d"]}
# {name: (action, message)}
BATCHES = {
    "no image slot": (
        lambda w: w.model({"image": w.images(2), "instruction_input": [f"{IMAGE}a ", "b "], **TWO}),
        SEVERAL.format("1: turns: 0 image slots in the questions, the sample has 1 images"),
    ),
    "more slots than images": (
        lambda w: w.model({"image": w.images(2), "instruction_input": [IMAGE * 2, IMAGE], **TWO}),
        SEVERAL.format("0: turns: 2 image slots in the questions, the sample has 1 images"),
    ),
    "a slot without an image": (
        lambda w: w.model({"instruction_input": [f"{IMAGE}a ", "b "], **TWO}),
        SEVERAL.format("0: turns: 1 image slots in the questions, the sample has 0 images"),
    ),
    "fewer answers than questions": (
        lambda w: w.model(
            {
                "conv_q": ["a#b#c"],
                "conv_a": ["d"],
                "connect_sym": ["#"],
                "sample_id": ["x.json record 7"],
            }
        ),
        "sample x.json record 7: 3 questions in conv_q, 1 answers in conv_a; expected as many, joined by '#'",
    ),
    "more answers than questions": (
        lambda w: w.model({"conv_q": ["a"], "conv_a": ["d!@#e"], "connect_sym": ["!@#"]}),
        "sample 0: 1 questions in conv_q, 2 answers in conv_a; expected as many, joined by '!@#'",
    ),
    "no symbol between turns": (
        lambda w: w.model({"conv_q": ["a"], "conv_a": ["d"]}),
        "sample 0: conv_q without connect_sym; expected what joins its turns, such as '!@#'",
    ),
    "length above the images": (
        lambda w: w.model({"image": w.images(2, 2), "length": [2, 3], **TWO}),
        "length: [2, 3]; expected for each of 2 samples 0 to 2, its images",
    ),
    "length of another number of samples": (
        lambda w: w.model({"image": w.images(2, 2), "length": [2], **TWO}),
        "length: [2]; expected for each of 2 samples 0 to 2, its images",
    ),
    "images of another size": (
        lambda w: w.model(
            {"image": torch.zeros(1, 3, 28, 28), "instruction_input": [IMAGE], "answer": ["c"]}
        ),
        "image: [1, 3, 28, 28]; expected [B, 3, <size>, <size>]: the processors' image_size must be model.image_size",
    ),
}
CALLS = {
    "generate: fewer texts": (
        lambda w: w.model.generate(w.images(2), ["a"]),
        "2 images and 1 texts; expected a list of texts, one for each image",
    ),
    "generate: one text": (
        lambda w: w.model.generate(w.images(1), IMAGE),
        "1 images and a text; expected a list of texts, one for each image",
    ),
    "generate: no slot": (
        lambda w: w.model.generate(w.images(1), ["a"]),
        "texts[0]: 'a' has 0 <ImageHere>; expected exactly one",
    ),
    "multi_select: one list too short": (
        lambda w: w.model.multi_select(w.images(2), [IMAGE, IMAGE], [["a", "b"], ["c"]]),
        "answers: 1 in one list; expected one for each of 2 prompts",
    ),
    "multi_select: no candidates": (
        lambda w: w.model.multi_select(w.images(1), [IMAGE], []),
        "answers: empty; expected at least one list of candidates",
    ),
    "multi_select: score": (
        lambda w: w.model.multi_select(w.images(1), [IMAGE], [["a"]], score="max"),
        "score: 'max'; expected one of sum, mean",
    ),
    "reduction": (
        lambda w: w.model({"answer": ["a"]}, reduction="sum"),
        "reduction: 'sum'; expected 'mean' or 'none'",
    ),
}
CONFIGURATIONS = {
    "negative rank": (
        lambda w: w.configure(lora_r=-1),
        "model.lora_r: -1; expected a rank, or 0 for a frozen LLM",
    ),
    "alpha": (lambda w: w.configure(lora_alpha=0), "model.lora_alpha: 0; expected at least 1"),
    "room for prompts": (
        lambda w: w.configure(max_context_len=0),
        "model.max_context_len: 0; expected at least 1",
    ),
    "template without a place": (
        lambda w: w.configure(prompt_template="[INST] [/INST]"),
        "model.prompt_template: '[INST] [/INST]' has 0 {}; expected exactly one, where the prompt goes",
    ),
    "patches that do not come out even": (
        lambda w: golden_model(
            V2, w.folder, image_size=5 * w.model.visual_encoder.patch_embed.patch_size[0]
        ),
        "model.image_size: <5 patches> gives 25 patches, which do not come out even in groups of 4; without a Q-Former "
        "take another size, such as 224 or 448",
    ),
}


def take_half(state, lora):
    for name in lora[: len(lora) // 2]:
        del state[name]


def write_twice(state, lora):
    state[lora[0].replace(".weight", ".default.weight")] = state[lora[0]].clone()


def name_otherwise(state, lora):
    state[lora[0].replace(".weight", ".mine.weight")] = state.pop(lora[0])


def spoil(state, lora):
    state[lora[0]][0, 0] = float("nan")


FILE = "model.ckpt: 'DIR/wrong.safetensors'"
Q, V = (
    f"llama_model.base_model.model.model.layers.0.self_attn.{target}.lora"
    for target in ("q_proj", "v_proj")
)
A, B = "[<rank>, <width>]", "[<width>, <rank>]"
UNKNOWN = (
    f"{FILE} does not fit: <all> tensors are unknown ({Q}_A.weight {A}, {Q}_B.weight {B}, {V}_A.weight {A}, ..). "
    "It has LoRA of rank <rank>, the model none: set model.lora_r=<rank>, as for MiniGPT-v2"
)
CHECKPOINTS = {
    "half of the LoRA": (
        lambda w: w.load_changed(take_half),
        f"{FILE} does not fit: <half> tensors are missing ({Q}_A.weight {A}, {Q}_B.weight {B}, {V}_A.weight {A}, ..)",
    ),
    "LoRA in the names of two versions of peft": (
        lambda w: w.load_changed(write_twice),
        f"{FILE}: {Q}_A.weight is there twice, in the names of two versions of peft; keep one of them",
    ),
    "another adapter's name": (
        lambda w: w.load_changed(name_otherwise),
        f"{FILE} does not fit: 1 tensor is missing ({Q}_A.weight {A}); 1 tensor is unknown ({Q}_A.mine.weight {A})",
    ),
    "LoRA that is not finite": (
        lambda w: w.load_changed(spoil),
        f"{FILE} holds numbers that are not finite: 1 tensor is bad ({Q}_A.weight). The training that wrote it had "
        "failed, or the file is damaged; use an earlier checkpoint",
    ),
    "LoRA of another rank": (
        lambda w: w.load(load_file(checkpoint_of(V2)), lora_r=2 * w.model.lora_r),
        f"{FILE} does not fit: <all> tensors are of another shape ({Q}_A.weight is {A}, expected [<twice>, <width>], "
        f"{Q}_B.weight is {B}, expected [<width>, <twice>], {V}_A.weight is {A}, expected [<twice>, <width>], ..). It "
        "has LoRA of rank <rank>, the model <twice>: set model.lora_r=<rank>, as for MiniGPT-v2",
    ),
    "LoRA for a frozen LLM": (
        lambda w: w.load(load_file(checkpoint_of(V2)), lora_r=0),
        UNKNOWN,
    ),
    "weights of MiniGPT-v2 for Llama-2 chat": (
        lambda w: w.load(load_file(checkpoint_of(V2)), LLAMA2),
        UNKNOWN,
    ),
    "behind a Q-Former, for a model without one": (
        lambda w: w.load(w.projection(vision=8), LLAMA2),
        f"{FILE} projects image vectors of width 8, the model has <vision>-wide ones: those of a Q-Former are narrow "
        "(8), merged patches wide (<vision>); set model.has_qformer as it was trained",
    ),
    "behind merged patches, for a model with Q-Former": (
        lambda w: w.load_2023(w.projection(vision=10_000)),
        f"{FILE} projects image vectors of width 10000, the model has <queries>-wide ones: those of a Q-Former are "
        "narrow (<queries>), merged patches wide (10000); set model.has_qformer as it was trained",
    ),
    "for a wider LLM": (
        lambda w: w.load(w.projection(width=9999)),
        f"{FILE} was trained for a 9999-wide LLM, model.llama_model is <width> wide; give a checkpoint and an LLM of "
        "one size",
    ),
}
BOXED = ROWS["flickr_ObjectToPhrase"][0]
DATA = {
    "a box out of range": (
        lambda w: w.annotated(
            "flickr_ObjectToPhrase", BOXED, {**BOXED, "bbox": "{<1><2><300><4>}"}
        ),
        "the box {<1><2><300><4>} is out of range; expected 0 <= x0 <= x1 <= 100, y alike",
    ),
    "a box turned round": (
        lambda w: w.annotated("flickr_ObjectToPhrase", BOXED, {**BOXED, "bbox": "{<9><2><3><4>}"}),
        "the box {<9><2><3><4>} is out of range; expected 0 <= x0 <= x1 <= 100, y alike",
    ),
    "an annotation without its image": (
        lambda w: w.annotated("flickr_ObjectToPhrase", {**BOXED, "image_id": "elsewhere"}),
        "datasets.flickr_ObjectToPhrase.build_info.image_path: no 'elsewhere.jpg' (a.json record 0) in 'DIR/coco', "
        "nor any other of 1 that were looked for",
    ),
}
MISTAKES = BATCHES | CALLS | CONFIGURATIONS | CHECKPOINTS | DATA


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(model, tmp_path, name):
    act, message = MISTAKES[name]
    num_lora = sum(".lora_" in each for each in model.trainable_state_dict())
    width, vision = model.llama_proj.weight.shape
    found = {
        "size": model.image_size,
        "rank": model.lora_r,
        "twice": 2 * model.lora_r,
        "width": width,
    }
    found |= {"vision": vision, "half": num_lora // 2, "all": num_lora}
    found |= {"5 patches": 5 * model.visual_encoder.patch_embed.patch_size[0]}
    found |= {"queries": golden_2023.CONFIG["qformer"]["bert_config"]["hidden_size"]}
    for key, value in found.items():
        message = message.replace(f"<{key}>", str(value))
    with pytest.raises((ValueError, OSError)) as caught:
        act(World(model, tmp_path))
    assert str(caught.value).replace(str(tmp_path), "DIR") == message
