"""Vision towers x bridges x LLM families, tiny and random: they train, resume and answer; wrong pairs are refused.

Packed and padded rows must agree; the relative noise of float32 was 1e-6 in the loss and 7e-7 in gradients.
"""

import json
import shutil
from argparse import Namespace
from itertools import product

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.config import Config, ConfigError, as_section
from minigpt4.common.optims import build_optimizer
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.conversation import Conversation, template_for
from minigpt4.models import MiniGPT4
from minigpt4.models.llm.language_model import load_tokenizer
from minigpt4.models.part_hashes import frozen_tensors, tensor_hashes
from minigpt4.models.training_parts import PARTS, part_of
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.rows import context_ids
from minigpt4.text.templates import read_chat_template
from tests.golden.model import write_vision_files
from tests.models import tiny_parts
from tests.models.tiny_parts import (
    LLMS,
    NUM_QUERIES,
    SIZE,
    TOWERS,
    WIDTH,
    write_llm,
    write_qformer,
    write_timm,
)
from tests.open_small import write_qwen3
from tests.training import endless, runner, settings

BRIDGES = ("qformer", "merged", "none")
VISION_SIDES = list(product([*TOWERS, "timm", "eva_clip_g"], BRIDGES))
# each LLM with two vision sides, each vision side with some LLM
PAIRS = [
    (VISION_SIDES[n % len(VISION_SIDES)], list(LLMS)[n % len(LLMS)]) for n in range(2 * len(LLMS))
]
TEXTS = ["a brown dog", "two cats on a sofa, asleep", "snow"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Return a function (vision side, LLM) -> keys of the section `model`; the files are written once."""
    root = tmp_path_factory.mktemp("parts")
    eva, golden_qformer = write_vision_files(root)
    towers = {name: {"vision_model": tiny_parts.write_tower(root, name)} for name in TOWERS}
    towers["timm"] = {"vision_model": "test_vit", "vit_ckpt": write_timm(root), "image_size": 64}
    towers["eva_clip_g"] = {"vit_ckpt": str(eva), "image_size": 28}  # of 14-pixel patches
    qformers = dict.fromkeys(TOWERS, write_qformer(root, WIDTH)) | {"timm": write_qformer(root, 64)}
    qformers["eva_clip_g"] = str(golden_qformer)
    llms = {name: write_llm(root, name) for name in LLMS}

    def keys(vision=("siglip", "merged"), llm="qwen3", **more):
        tower, bridge = vision
        section = {
            **towers[tower],
            "bridge": bridge,
            "llama_model": llms[llm],
            "num_query_token": NUM_QUERIES,
        }
        section |= {"q_former_model": qformers[tower], "check_llm": False, "llm_precision": "fp32"}
        return section | more

    return keys


def built(section):
    """Return the model of a section; the random projection is the same at every call."""
    torch.manual_seed(0)
    return MiniGPT4.from_config(section, device="cpu")


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(len(TEXTS), 3, size, size, generator=generator),
        "text_input": list(TEXTS),
    }


def gradients(model, samples):
    """Return {name: gradient} of the trained parameters, without dropout."""
    model.zero_grad()
    model.eval()(samples)["loss"].backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_close(found, expected, tolerance=1e-5):
    """Compare tensors relative to their norm, or to a thousandth of the total: the bias of keys has only noise."""
    assert found.keys() == expected.keys() and found
    whole = torch.stack([tensor.norm() for tensor in expected.values()]).norm()
    for name, tensor in found.items():
        distance = (tensor - expected[name]).norm() / torch.maximum(
            expected[name].norm(), whole / 1000
        )
        assert distance < tolerance, (name, distance.item())


# the matrix


@pytest.mark.parametrize(
    "vision, llm", PAIRS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_trains_saves_loads_resumes_and_answers(parts, tmp_path, vision, llm):
    is_lora = llm not in ("phi3", "gpt_neox")  # their attention has no q_proj and v_proj
    section = parts(
        vision, llm, lora_r=2 if is_lora else 0, projector="mlp2x_gelu" if is_lora else "linear"
    )
    model = built(section)
    frozen, start = tensor_hashes(frozen_tensors(model)), model.trainable_state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    batches = [batch(model.image_size, seed) for seed in range(3)]
    changes = {"max_epoch": 2, "iters_per_epoch": 3, "warmup_steps": 0, "init_lr": 1e-2}
    run = runner(settings(tmp_path / "whole", **changes), model)
    run.train(endless(batches))
    # all trained tensors changed and nothing else did; the checkpoint has exactly these
    assert tensor_hashes(frozen_tensors(model)) == frozen
    path = run.output_dir / "checkpoint_1.pth"
    saved = torch.load(path, weights_only=True)
    assert saved["model"].keys() == start.keys()
    assert not [name for name, tensor in saved["model"].items() if torch.equal(tensor, start[name])]
    # resumed after the first epoch the result is the same
    half = built(section)
    resumed = settings(
        tmp_path / "half", resume_ckpt_path=str(run.output_dir / "checkpoint_0.pth"), **changes
    )
    runner(resumed, half).train(endless(batches))
    assert all(
        torch.equal(tensor, saved["model"][name])
        for name, tensor in half.trainable_state_dict().items()
    )
    # loaded as model.ckpt it is the same, too; packed and padded agree
    loaded = built(section | {"ckpt": str(path)})
    assert all(
        torch.equal(tensor, saved["model"][name])
        for name, tensor in loaded.trainable_state_dict().items()
    )
    packed = gradients(loaded, batches[0])
    assert loaded.llm_backend == (
        "padded" if llm == "gemma2" else "packed" if is_lora else loaded.llm_backend
    )
    padded = built(section | {"ckpt": str(path), "pack_sequences": False})
    assert_close(packed, gradients(padded, batches[0]))
    # an answer with the image in it
    chat = Chat(loaded, Blip2ImageEvalProcessor(loaded.image_size))
    conv = Conversation(template_for(loaded.prompt_template, loaded.end_sym))
    images = []
    chat.upload_img(batches[0]["image"][0], conv, images)
    chat.ask("What is this?", conv)
    _, ids = chat.answer(conv, images, max_new_tokens=4, num_beams=1, do_sample=False)
    assert images[0].shape[1] == loaded.num_image_tokens and 1 <= len(ids) <= 4


def test_packed_is_padded_for_every_tower_bridge_and_llm(parts):
    """The full product; each vision side encodes once, and its vectors are projected for each LLM."""
    sides = {}
    for vision in VISION_SIDES:
        model = built(parts(vision))
        model.llama_proj = nn.Identity()
        with torch.no_grad():
            sides[vision] = model.encode_images(batch(model.image_size)["image"])
    backends = {}
    for llm in LLMS:
        model = built(parts(llm=llm))
        backends[llm] = model.choose_backend()
        for vectors in sides.values():
            model.bridge_shape = vectors.shape[1:]
            project = nn.Linear(
                vectors.shape[2], model.llama_model.get_input_embeddings().weight.shape[1]
            )
            found = []
            for backend in (backends[llm], "padded"):
                model.llm_backend = backend
                loss = model.row_losses(model.rows(batch(1)), project(vectors))["loss"].mean()
                found.append([loss, *torch.autograd.grad(loss, project.parameters())])
            assert_close(*[dict(enumerate(values)) for values in found])
    lean = ("llama2", "llama3", "qwen2", "qwen3", "smollm")
    assert backends == dict.fromkeys(LLMS, "packed") | dict.fromkeys(lean, "lean") | {
        "gemma2": "padded"
    }


# towers


@pytest.mark.parametrize("name", TOWERS)
def test_a_folders_tower_gives_its_own_hidden_states(parts, name):
    section = as_section(parts((name, "none")), MiniGPT4.Config, "model")
    tower = MiniGPT4.tower(section)
    whole = AutoModel.from_pretrained(section.vision_model)
    whole = getattr(whole, "vision_model", whole).eval()
    assert tower.num_prefix == TOWERS[name][1] and (tower.mean, tower.std) == (
        (0.4, 0.5, 0.6),
        (0.2, 0.3, 0.25),
    )
    for size in (SIZE, 42):  # its own, and one for which position embeddings are resampled
        network = tower.build(size)
        tower.load(network, section.vision_model, "model.vision_model")
        pixels, options = torch.randn(2, 3, size, size), {}
        if name == "siglip2":  # takes patches, colours last
            rows = size // tiny_parts.PATCH
            patches = nn.functional.unfold(
                pixels, tiny_parts.PATCH, stride=tiny_parts.PATCH
            ).transpose(1, 2)
            given = patches.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
            options = {"pixel_attention_mask": None, "spatial_shapes": torch.full((2, 2), rows)}
        else:
            given = pixels
            options = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
        with torch.no_grad():
            expected = whole(given, output_hidden_states=True, **options).hidden_states[-2]
            found = network(pixels)
        assert found.shape == (2, tower.num_tokens(size), WIDTH)
        assert torch.allclose(found, expected, atol=1e-5)  # noise 0 to 1e-6, of numbers around 1


@pytest.mark.parametrize("vision", [("siglip2", "qformer"), ("timm", "none")])
def test_the_plan_is_what_is_built(parts, vision):
    train = {"vision": "full", "bridge": "full" if vision[1] == "qformer" else None, "llm": "full"}
    section = as_section(parts(vision, train=train, llm_precision="bf16"), MiniGPT4.Config, "model")
    assert MiniGPT4.preflight(section) == []
    assert MiniGPT4.plan(section, "cpu") == built(section).parts()
    assert MiniGPT4.training_memory(section, "cuda", 2) > 0


def test_images_are_the_towers_unless_the_yaml_says_otherwise(parts, tmp_path):
    def config(**processor):
        section = {
            "arch": "mini_gpt4",
            "model_type": "pretrain_vicuna",
            "prompt_template": None,
            **parts(),
        }
        train = {"vis_processor": {"train": {"name": "blip2_image_train", **processor}}}
        datasets = {
            "mine": {"builder": "image_text_folder", "build_info": {"storage": "x"}, **train}
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({"model": section, "datasets": datasets}))
        return Config(Namespace(cfg_path=path, options=None))

    found = config()
    assert found.model_cfg.image_size == SIZE and found.model_cfg.prompt_template.startswith(
        "<|im_start|>user"
    )
    processor = found.datasets_cfg.mine.vis_processor.train
    assert (processor.image_size, processor.mean, processor.std) == (
        SIZE,
        tiny_parts.MEAN,
        tiny_parts.STD,
    )
    with pytest.raises(
        ConfigError, match="image_size: 56, but the model takes images of 28 pixels"
    ):
        config(image_size=56)
    told = config(mean=[0.5, 0.5, 0.5]).report.warnings
    assert len(told) == 1 and "the model's vision tower was trained with [0.4, 0.5, 0.6]" in told[0]


def test_a_folder_with_the_file_of_a_whole_processor(parts, tmp_path):
    """transformers 5 saves the settings of an image processor within that file, and no other."""
    from transformers import SiglipImageProcessor, SiglipProcessor

    section = as_section(parts(), MiniGPT4.Config, "model")
    shutil.copytree(section.vision_model, tmp_path / "siglip")
    section.vision_model = str(tmp_path / "siglip")
    (tmp_path / "siglip/preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config.json \(or processor_config.json\)"):
        MiniGPT4.tower(section)
    images = SiglipImageProcessor(image_mean=tiny_parts.MEAN, image_std=tiny_parts.STD)
    processor = SiglipProcessor(images, AutoTokenizer.from_pretrained(section.llama_model))
    processor.save_pretrained(tmp_path / "siglip")
    assert not (tmp_path / "siglip/preprocessor_config.json").exists()
    tower = MiniGPT4.tower(section)
    assert (tower.mean, tower.std) == (tuple(tiny_parts.MEAN), tuple(tiny_parts.STD))
    (tmp_path / "siglip/processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(ValueError, match=r" processor_config.json in '.*' names no image_mean"):
        MiniGPT4.tower(section)


def test_files_that_lack_a_tensor_or_have_one_more_are_refused(parts, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    AutoModel.from_config(TOWERS["clip"][0]).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    whole = load_file(folder / "model.safetensors")
    name = next(name for name in whole if name.endswith("layers.0.mlp.fc1.weight"))
    for state, message in (
        ({key: tensor for key, tensor in whole.items() if key != name}, "1 tensor is missing"),
        (whole | {"another.weight": torch.ones(2)}, "1 tensor is unknown"),
        (whole | {name: torch.ones(3, 3)}, "does not fit: .*mlp.fc1.weight is"),
    ):
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"^model.vision_model: .*{message}"):
            built(parts(("clip", "none"), vision_model=str(folder)))


@pytest.mark.parametrize("tower", [*TOWERS, "timm"])
def test_a_frozen_tower_in_half_precision_is_close_to_float32(parts, tower):
    vectors = []
    for precision in ("fp32", "bf16"):
        model = built(parts((tower, "none"), llm_precision=precision))
        with torch.no_grad():
            vectors.append(model.encode_images(batch(model.image_size)["image"]).float())
    assert torch.bfloat16 in {parameter.dtype for parameter in model.visual_encoder.parameters()}
    assert (vectors[0] - vectors[1]).norm() < 0.03 * vectors[0].norm()  # 0.38 to 0.58 % here


# what trains


def test_every_part_has_the_gradient_of_a_plain_path(parts):
    """Compared with whole models of transformers, one sample at a time, with only the rows made by our code."""
    everything = dict.fromkeys(PARTS, "full") | {"bridge": None}
    section = parts(projector="mlp2x_gelu", train=everything)
    model = built(section)
    samples = batch(SIZE)
    found = gradients(model, samples)
    assert {part_of(name) for name in found} == {
        "vision",
        "projector",
        "llm",
    } and model.llm_backend == "packed"
    # the plain path
    tower = AutoModel.from_pretrained(section["vision_model"])
    llm = AutoModelForCausalLM.from_pretrained(section["llama_model"], attn_implementation="eager")
    norm, projector = nn.LayerNorm(WIDTH), built(section).llama_proj
    hidden = norm(tower(samples["image"], output_hidden_states=True).hidden_states[-2])
    vectors = projector(hidden.reshape(len(TEXTS), -1, 4 * WIDTH))
    losses = []
    for row, image in zip(model.rows(samples), vectors, strict=True):
        ids = torch.tensor(row.ids)
        embeds = llm.get_input_embeddings()(ids.clamp(min=0))
        embeds = torch.cat([image, embeds[len(image) :]])  # the image comes first: Qwen has no BOS
        logits = llm(inputs_embeds=embeds[None]).logits[0, :-1]
        losses.append(
            nn.functional.cross_entropy(logits, torch.tensor(row.labels)[1:], reduction="none")
        )
    losses = torch.cat(losses)
    (losses.sum() / sum(row.num_targets for row in model.rows(samples))).backward()
    plain = {
        f"visual_encoder.model.{name}": parameter.grad
        for name, parameter in tower.named_parameters()
    }
    plain |= {f"ln_vision.{name}": parameter.grad for name, parameter in norm.named_parameters()}
    plain |= {
        f"llama_proj.{name}": parameter.grad for name, parameter in projector.named_parameters()
    }
    plain |= {f"llama_model.{name}": parameter.grad for name, parameter in llm.named_parameters()}
    assert_close(found, {name: plain[name] for name in found})
    # a part that trains alone has the same gradient, with whichever backend the LLM runs
    for part in ("vision", "projector", "llm"):
        modes = dict.fromkeys(PARTS, "frozen") | {part: "full"}
        alone = built(section | {"train": modes | {"projector": modes["projector"]}})
        own = gradients(alone, samples)
        assert {part_of(name) for name in own} == {part}
        assert_close(own, {name: plain[name] for name in own})
        assert alone.llm_backend == ("packed" if part == "llm" else "lean")


def test_a_bridge_trains_as_on_the_padded_path(parts):
    section = parts(("clip", "qformer"), train={"bridge": "full", "projector": "full"})
    found = gradients(built(section), batch(SIZE))
    assert {part_of(name) for name in found} == {"bridge", "projector"}
    assert_close(found, gradients(built(section | {"pack_sequences": False}), batch(SIZE)))


def test_an_llm_that_trains_is_in_float32_and_learns_in_half_precision(parts):
    model = built(parts(llm="mistral", llm_precision="bf16", train={"llm": "full"}))
    assert {parameter.dtype for parameter in model.llama_model.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-3
    )
    losses = []
    for _ in range(8):
        loss = model.train()(batch(SIZE))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # from 5.9 to below 4 here
    assert model.llm_backend == "packed" and losses[-1] < losses[0] - 0.5


def test_a_batch_of_text_alone_gives_a_gradient_whatever_trains(parts):
    samples = {
        "image": torch.zeros(0, 3, SIZE, SIZE),
        "text_input": ["only words"],
        "num_images": [0],
    }
    for train in (
        {"projector": "full"},
        {"vision": "full", "projector": "frozen"},
        {"llm": "full"},
    ):
        model = built(parts(train=train))
        model(samples)["loss"].backward()
        assert any(parameter.grad is not None for parameter in model.parameters())


def test_each_part_has_its_own_learning_rate(parts, tmp_path):
    model = built(parts(("clip", "qformer"), train=dict.fromkeys(PARTS, "full")))
    cfg = settings(tmp_path, init_lr=1e-3, lr={"vision": 1e-5, "llm": 2e-5, "bridge": 1e-3}).run_cfg
    optimizer = build_optimizer(model, cfg, torch.device("cpu"))
    from minigpt4.common.optims import LinearWarmupCosineLRScheduler

    schedule = LinearWarmupCosineLRScheduler(optimizer, cfg, 6)
    assert schedule.step(0, 3) == pytest.approx(schedule.lr(0, 3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(part_of(names[id(parameter)]), set()).add(
                round(group["lr"] / schedule.lr(0, 3), 9)
            )
    assert rates == {"vision": {0.01}, "llm": {0.02}, "bridge": {1}, "projector": {1}}
    # without rates of their own the two groups of 2023
    assert (
        len(build_optimizer(model, settings(tmp_path).run_cfg, torch.device("cpu")).param_groups)
        == 2
    )


# what does not go together


def test_a_checkpoint_of_another_llm_tower_bridge_or_projector_is_refused(parts, tmp_path):
    model, path = built(parts()), tmp_path / "trained.pth"
    state = {"model": model.trainable_state_dict(), "progress": {"identity": model.identity()}}
    torch.save(state, path)
    ckpt = {"ckpt": str(path)}
    built(parts(**ckpt))
    for other, message in (
        (
            parts(llm="qwen2", **ckpt),
            "trained with model.llama_model qwen3: .* this model has qwen2: .*embeddings",
        ),
        (
            parts(("dinov2", "merged"), **ckpt),
            "trained with model.vision_model siglip_vision_model, .* dinov2",
        ),
        (parts(("siglip", "none"), **ckpt), "trained with model.bridge merged, .* none"),
        (
            parts(projector="mlp2x_gelu", **ckpt),
            "trained with model.projector linear, .* mlp2x_gelu",
        ),
    ):
        with pytest.raises(CheckpointError, match=f"^model.ckpt: '{path}' was {message}"):
            built(other)
        with pytest.raises(CheckpointError, match=message):  # --dry-run, too
            MiniGPT4.plan(as_section(other, MiniGPT4.Config, "model"), "cpu")
    # a checkpoint without an identity is recognised by its tensors
    torch.save({"model": state["model"]}, path)
    with pytest.raises(CheckpointError, match="has a projection linear, the model mlp2x_gelu"):
        built(parts(projector="mlp2x_gelu", **ckpt))


def test_a_run_is_not_resumed_or_evaluated_with_another_part(parts, tmp_path, caplog):
    """Like model.ckpt, also with resume_mode=restart, which compares no settings; the wrong parts have the right sizes."""
    run = runner(settings(tmp_path / "first", max_epoch=1, iters_per_epoch=1), built(parts()))
    run.train(endless([batch(SIZE)]))
    path = run.output_dir / "checkpoint_0.pth"
    for changes in ({"resume_mode": "restart"}, {"evaluate": True}):
        cfg = settings(tmp_path / "second", resume_ckpt_path=str(path), **changes)
        message = f"^run.resume_ckpt_path: '{path}' was trained with model"
        with pytest.raises(CheckpointError, match=f"{message}.vision_model siglip_vision_model, "):
            runner(cfg, built(parts(("siglip2", "merged")))).train(endless([batch(SIZE)]))
        with pytest.raises(CheckpointError, match=f"{message}.llama_model qwen3: "):
            runner(cfg, built(parts(llm="qwen2"))).train(endless([batch(SIZE)]))
    # other weights of the same kind cause a warning
    restarted = settings(
        tmp_path / "third", resume_ckpt_path=str(path), resume_mode="restart", max_epoch=2
    )
    model = built(parts())
    model.llm_identity = model.llm_identity | {"fingerprint": "another"}
    caplog.clear()
    runner(restarted, model).train(endless([batch(SIZE)]))
    assert f"run.resume_ckpt_path: '{path}' was trained with another LLM" in caplog.text


def test_what_an_earlier_stage_trained_goes_on_into_the_next_ones_checkpoints(parts, tmp_path):
    """Stage 1 trains tower and projection, stage 2 only the LLM; the checkpoint of stage 2 holds all three."""
    sizes = {"max_epoch": 1, "iters_per_epoch": 2, "warmup_steps": 0, "init_lr": 1e-2}
    stages = (
        {"vision": "full", "projector": "full", "llm": "frozen"},
        {"vision": "frozen", "projector": "frozen", "llm": "full"},
    )
    model, ckpt = None, ""
    for number, train in enumerate(stages):
        section = parts(("clip", "none"), train=train, ckpt=ckpt)
        model = built(section)
        run = runner(settings(tmp_path / str(number), **sizes), model)
        run.train(endless([batch(SIZE)]))
        ckpt = str(run.output_dir / "checkpoint_0.pth")
    tops = {name.split(".")[0] for name in torch.load(ckpt, weights_only=True)["model"]}
    assert tops == {"visual_encoder", "ln_vision", "llama_proj", "llama_model"}
    opened = built(parts(("clip", "none"), ckpt=ckpt))
    own = model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in opened.state_dict().items())
    # resumed without the file of stage 1 it is complete, too
    last = settings(tmp_path / "again", resume_ckpt_path=ckpt, **sizes | {"max_epoch": 2})
    resumed = built(parts(("clip", "none"), train={"llm": "full"}))
    resumed.freeze("llama_proj")
    run = runner(last, resumed)
    run.train(endless([batch(SIZE)]))
    saved = torch.load(run.output_dir / "checkpoint_1.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in saved} == tops
    assert torch.equal(saved["llama_proj.weight"], own["llama_proj.weight"])


WRONG = {
    "an LLM as tower": (
        {"vision_model": "LLM"},
        "^model.vision_model: .* type 'qwen3', which is no known vision tower",
    ),
    "a tower as LLM": ({"llama_model": "TOWER"}, "^model.llama_model: transformers cannot read"),
    "an unknown name": (
        {"vision_model": "nothing"},
        "model.vision_model: 'nothing' is no known vision tower: expected eva_clip_g, or",
    ),
    "no plain ViT": (
        {"vision_model": "resnet10t", "vit_ckpt": "FILE"},
        "model.vision_model: timm's resnet10t is a ResNet",
    ),
    "a ViT behind a CNN": (
        {"vision_model": "vit_tiny_r_s16_p8_224", "vit_ckpt": "FILE"},
        "timm's vit_tiny_r_s16_p8_224 is a VisionTransformer behind a HybridEmbed; expected",
    ),
    "no weight file": (
        {"vision_model": "test_vit"},
        "model.vit_ckpt: missing; .* of timm needs its weight file",
    ),
    "a size between patches": (
        {"image_size": 30},
        "model.image_size: 30 is no multiple .* size 7; take 28 or 35",
    ),
    "an uneven number of patches": (
        {"image_size": 35},
        "25 patches, which do not come out even in groups of 4",
    ),
    "a Q-Former of another width": (
        {"bridge": "qformer", "q_former_model": "FILE"},
        "64-wide .* makes 32-wide ones",
    ),
    "a new Q-Former that is frozen": (
        {"bridge": "qformer", "q_former_model": "new"},
        "model.q_former_model: new: it",
    ),
    "a bridge without weights": (
        {"train": {"bridge": "full"}},
        "model.train.bridge: full; the bridge merged has no",
    ),
    "LoRA without a rank": ({"train": {"llm": "lora"}}, "model.train.llm: lora; needs a rank"),
    "LoRA of the tower": (
        {"train": {"vision": "lora"}},
        "model.train.vision: lora; LoRA is for the LLM alone",
    ),
    "a rank and no LoRA": (
        {"train": {"llm": "full"}, "lora_r": 2},
        "model.train.llm: full; model.lora_r is 2",
    ),
    "packed weights that train": (
        {"train": {"llm": "full"}, "low_resource": True},
        "weights in 8 or 4 bits do not",
    ),
    "a random frozen projection": (
        {"train": {"projector": "frozen"}},
        "it is random without model.ckpt",
    ),
    "a word": (
        {"train": {"vision": "thawed"}},
        "model.train.vision: thawed; expected one of frozen, full, lora",
    ),
    "a bridge": (
        {"bridge": "brooklyn"},
        "model.bridge: 'brooklyn' is not one of qformer, merged, none",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_pairs_are_refused_by_name(parts, name):
    changes, message = WRONG[name]
    places = {"LLM": parts()["llama_model"], "TOWER": parts()["vision_model"]}
    places["FILE"] = parts(("timm", "qformer"))["q_former_model"]
    changes = {
        key: places.get(value, value) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    section = as_section(parts() | changes, MiniGPT4.Config, "model")
    with pytest.raises(ValueError, match=message):
        if problems := MiniGPT4.preflight(section):
            raise ValueError("; ".join(map(str, problems)))
        MiniGPT4.plan(section, "cpu")


# templates


EXPECTED = {
    "llama2": ("", "\n"),
    "qwen3": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "smollm": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "mistral": ("[INST] {}[/INST]", "</s>"),
    "gemma": ("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
    "phi3": ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>\n"),
}


@pytest.mark.parametrize("llm", EXPECTED)
def test_the_template_is_the_tokenizers_own_where_none_is_named(parts, llm):
    section = as_section(parts(llm=llm), MiniGPT4.Config, "model")
    MiniGPT4.settle(section)
    assert (section.prompt_template, section.end_sym) == EXPECTED[llm]
    assert section.mask_eos_labels is (llm == "llama2")
    named = as_section(parts(llm=llm, prompt_template="", end_sym="#"), MiniGPT4.Config, "model")
    MiniGPT4.settle(named)
    assert (named.prompt_template, named.end_sym) == ("", "#")
    if llm == "llama2":
        return
    # a dialogue of two turns is what the tokenizer's own template writes, except for its system message and for spaces
    # before answers
    model = built({**section, "max_txt_len": 300})
    questions, answers = ("Is it red?", "Is it blue?"), ("yes", "no")
    samples = {"image": torch.zeros(0, 3, SIZE, SIZE), "num_images": [0], "text_input": ["no"]}
    samples["turns"] = [list(zip(questions, answers, strict=True))]
    text = model.llama_tokenizer.decode(model.rows(samples)[0].ids)
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    own = model.llama_tokenizer.apply_chat_template(turns, tokenize=False)
    found, expected = (dialogue[dialogue.index(questions[0]) :].split() for dialogue in (text, own))
    assert "".join(found) == "".join(expected) and text.endswith(section.end_sym)


def test_an_end_symbol_that_the_chat_template_replaces_is_named(parts, caplog):
    for end_sym, is_named in (("\n\n", True), ("\n", False), ("<|im_end|>", False)):
        caplog.clear()
        section = as_section(parts(llm="qwen3", end_sym=end_sym), MiniGPT4.Config, "model")
        MiniGPT4.settle(section)
        assert section.end_sym == "<|im_end|>"
        message = f"model.end_sym: {end_sym!r} is replaced by '<|im_end|>'"
        assert (message in caplog.text) is is_named, caplog.text


def test_qwen_3_reads_what_its_own_tokenizer_writes(tmp_path):
    """As published: config.json names a BOS, the tokenizer has none, and texts do not begin with one."""
    write_qwen3(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    published = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "add_bos_token": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | published))
    own, tokenizer = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).bos_token_id == own.convert_tokens_to_ids(
        "<|endoftext|>"
    )
    assert type(own).__name__ == "Qwen2Tokenizer" and tokenizer.bos_token is None
    conv = Conversation(template_for(*read_chat_template(tokenizer)))
    conv.append_message(conv.roles[0], "Is it red?")
    conv.append_message(conv.roles[1], None)
    text = own.apply_chat_template(
        [{"role": "user", "content": "Is it red?"}], tokenize=False, add_generation_prompt=True
    )
    ids = context_ids(conv.segments(), PromptEncoder(tokenizer), [])
    assert ids == own(text).input_ids and own.decode(ids[:2]) == "<|im_start|>u"


def test_without_bos_a_repetition_penalty_finds_nothing_written_yet(parts):
    model = built(parts(llm="qwen3", prompt_template=""))
    chat = Chat(model, Blip2ImageEvalProcessor(model.image_size))
    conv = Conversation(template_for("{}", "#"))
    conv.append_message(conv.roles[0], "What?")

    def likeliest(module, inputs, logits):
        scores = torch.zeros_like(logits)
        scores[..., 0], scores[..., 1] = 2, 1.9
        return scores

    hook = model.llama_model.lm_head.register_forward_hook(likeliest)
    _, ids = chat.answer(conv, [], max_new_tokens=2, temperature=0, repetition_penalty=1.5)
    hook.remove()
    assert model.llama_tokenizer.bos_token is None and ids.tolist() == [0, 1]


def test_a_chat_template_that_cannot_be_used_says_so(parts):
    section = as_section(parts(), MiniGPT4.Config, "model")
    tokenizer = load_tokenizer(section.llama_model)
    for template in ("{{ raise_exception('no') }}", "{{ messages[-1].content }}", "{{ broken"):
        tokenizer.chat_template = template
        message = r"^model\.prompt_template: the tokenizer's own chat template cannot be used"
        with pytest.raises(ValueError, match=message):
            read_chat_template(tokenizer)
