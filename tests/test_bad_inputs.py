"""What a user gets wrong, and exactly what is said about it: never a traceback, never anything half-written.

`{root}` in a message stands for the folder of the small release, `{tmp}` for the folder of the test.
"""

import json
import os
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from minigpt4 import train
from minigpt4.common.cli import run_program
from minigpt4.common.registry import registry
from tests.small_release import jpeg_bytes, picture, write_align_folder, write_checkpoint, write_tar

KNOWN_BUILDERS = f"known: {', '.join(registry.names('builder'))}."
STAGE_1 = "train_configs/minigpt4_stage1_pretrain.yaml"
STAGE_2 = "train_configs/minigpt4_stage2_finetune.yaml"


@dataclass
class Bad:
    """One row: what is wrong, how it is made, and the lines that must be printed."""

    name: str
    messages: list
    options: list = field(default_factory=list)
    text: tuple = ()  # (old, new): replaced in the YAML file
    make: object = None  # called with the test's folder, returns more options
    yaml: str = STAGE_2
    code: int = 2
    is_beginning: bool = False  # the messages go on in words of transformers


def options_of(**pairs):
    return [f"{key.replace('__', '.')}={value}" for key, value in pairs.items()]


JPEG = jpeg_bytes(picture(1))


def break_images(folder):
    for path in (folder / "image").iterdir():
        path.write_bytes(b"no image")


def resume(tmp, release):
    torch.save({"model": {"llama_proj.weight": torch.zeros(64, 40)}}, tmp / "weights.pth")
    return [f"run.resume_ckpt_path={tmp / 'weights.pth'}"]


# -- makers of bad files: each returns the options that point to them


def checkpoint(write):
    def make(tmp, release):
        write(tmp / "bad.pth")
        return options_of(model__ckpt=tmp / "bad.pth")

    return make


def with_nan(path):
    write_checkpoint(path, 40, 64, **{"llama_proj.bias": torch.full((64,), float("nan"))})


def html_page(path):
    path.write_text("<!DOCTYPE html><html>404 Not Found</html>")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 269060552\n"


def lfs_pointer(path):
    path.write_text(POINTER)


def payload(path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (path.parent / "executed",)

    with open(path, "wb") as file:
        pickle.dump({"model": Payload()}, file)


def truncated(path):
    write_checkpoint(path, 40, 64)
    path.write_bytes(path.read_bytes()[:5000])


def renamed(path):
    torch.save(
        {"model": {"proj.weight": torch.zeros(64, 40), "llama_proj.bias": torch.zeros(64)}}, path
    )


def wrapped(path):
    names = {
        "module.llama_proj.weight": torch.zeros(64, 40),
        "module.llama_proj.bias": torch.zeros(64),
    }
    torch.save({"model": names}, path)


def without_bias(path):
    torch.save({"model": {"llama_proj.weight": torch.zeros(64, 40)}}, path)


def with_more(path):
    write_checkpoint(path, 40, 64, **{"llama_model.lm_head.weight": torch.zeros(3, 3)})


def align(change):
    def make(tmp, release):
        write_align_folder(tmp / "align", 3)
        change(tmp / "align")
        return options_of(datasets__cc_sbu_align__build_info__storage=tmp / "align")

    return make


def annotations(content):
    return align(lambda folder: (folder / "filter_cap.json").write_text(content))


def records(*items):
    return annotations(json.dumps({"annotations": list(items)}))


def shards(write, storage="bad/00000.tar"):
    def make(tmp, release):
        (tmp / "bad").mkdir()
        write(tmp / "bad")
        return [
            *options_of(datasets__laion__build_info__storage=tmp / storage),
            "run.num_workers=0",
        ]

    return make


def shard_of(*members):
    return shards(lambda folder: write_tar(folder / "00000.tar", members))


def vision(key, change, name):
    def make(tmp, release):
        for suffix in (".pth", ".json"):
            shutil.copy(release.hub / f"{name}{suffix}", tmp)
        change(tmp / f"{name}.pth")
        return [f"model.{key}={tmp / name}.pth"]

    return make


def drop_tensor(path):
    state = torch.load(path, weights_only=True)
    inner = state.get("model", state)
    inner.pop(next(name for name in inner if name.endswith(("norm1.weight", "LayerNorm.weight"))))
    torch.save(state, path)


def llm(change):
    def make(tmp, release):
        shutil.copytree(release.llama, tmp / "llm")
        change(tmp / "llm")
        return [f"model.llama_model={tmp / 'llm'}"]

    return make


def llm_file(name, text):
    return llm(lambda folder: (folder / name).write_text(text))


def llm_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "evil.py").write_text("open('executed', 'w')")

    return llm(change)


def in_shards(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def scrambled(folder):
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(0)
    state = load_file(folder / "model.safetensors")
    noise = {
        name: torch.randn(tensor.shape, generator=generator) * 0.02
        for name, tensor in state.items()
    }
    save_file(noise, folder / "model.safetensors")


def prompts(text):
    def make(tmp, release):
        (tmp / "prompts.txt").write_text(text)
        return [f"model.prompt_path={tmp / 'prompts.txt'}"]

    return make


def own(name, content):
    """Own data in place of stage 2's: an annotation file, or, without a name, a folder with one image."""

    def make(tmp, release):
        (tmp / "own").mkdir()
        (tmp / "own/a.jpg").write_bytes(JPEG)
        if name and content is not None:
            (tmp / "own" / name).write_text(content)
        return options_of(datasets__cc_sbu_align__build_info__storage=tmp / "own" / name)

    return make


JSONL = ("  cc_sbu_align:", "  cc_sbu_align:\n    builder: image_text_jsonl")
FOLDER = ("  cc_sbu_align:", "  cc_sbu_align:\n    builder: image_text_folder")
OWN_STORAGE = "datasets.cc_sbu_align.build_info.storage"

ROWS = [
    # the YAML file itself
    Bad("no such file", ["--cfg-path: no file at 'nowhere.yaml'"], yaml="nowhere.yaml"),
    Bad(
        "a folder",
        ["--cfg-path: 'train_configs' is a folder; give a YAML file"],
        yaml="train_configs",
    ),
    Bad(
        "not YAML",
        [
            "--cfg-path: '{tmp}/config.yaml' is not valid YAML in line 25; look at brackets, quotes, indentation"
        ],
        text=("run:\n", "run: [\n"),
    ),
    Bad(
        "no sections",
        [
            "datasets: this section is missing; a configuration needs model, datasets, run",
            "model.arch: missing; known: mini_gpt4, minigpt4, minigpt_v2",
            "run.lr_sched: missing; it has no default",
            "run.init_lr: missing; it has no default",
            "run.min_lr: missing; it has no default",
            "run.weight_decay: missing; it has no default",
            "run.batch_size_train: missing; it has no default",
        ],
        text=None,
    ),
    Bad(
        "a section misspelt",
        [
            "datsets: unknown section. Did you mean 'datasets'? (config.yaml line 13)",
            "datasets.cc_sbu_align.vis_processor.train: missing; name an image processor, e.g. {name: blip2_image_train, image_size: 224}",
        ],
        text=("datasets:", "datsets:"),
    ),
    Bad(
        "a section missing",
        [
            "run.lr_sched: missing; it has no default",
            "run.init_lr: missing; it has no default",
            "run.min_lr: missing; it has no default",
            "run.weight_decay: missing; it has no default",
            "run.batch_size_train: missing; it has no default",
        ],
        text=("run:\n", "preprocess:\n"),
    ),
    # keys and values
    Bad(
        "a key misspelt",
        ["model.freez_vit: unknown key. Did you mean 'freeze_vit'? (config.yaml line 4)"],
        text=("freeze_vit:", "freez_vit:"),
    ),
    Bad(
        "a number that is a word",
        ["run.init_lr: 'fast' (str) is not a float or null (config.yaml line 26)"],
        text=("init_lr: 3e-5", "init_lr: fast"),
    ),
    Bad(
        "a choice that is none",
        ["model.vit_precision: 'bf16' is not one of fp16, fp32 (--options)"],
        ["model.vit_precision=bf16"],
    ),
    Bad(
        "a choice of earlier versions",
        [
            "model.llm_quantization: 'fp8' is not one of none, int8, nf4, int4; fp8 was removed, since it trained "
            "slower than fp16; take int8, which needs as little memory and is closer to fp16: figures are in "
            "docs/performance.md (config.yaml line 4)"
        ],
        text=("freeze_vit:", "llm_quantization: fp8\n  freeze_vit:"),
    ),
    Bad(
        "what is not recorded",
        [
            "model.cuda_graphs: model.train.vision is full, which is not recorded; set it to False (--options)",
            "model.cuda_graphs: model.llm_checkpointing is True, which is not recorded; set it to False (--options)",
        ],
        ["model.cuda_graphs=True", "model.freeze_vit=False", "model.llm_checkpointing=True"],
    ),
    Bad(
        "a number out of range",
        [
            "run.warmup_steps: -3 is out of range; it must be at least 0 (--options)",
            "run.max_epoch: 0 is out of range; it must be at least 1 (--options)",
        ],
        ["run.max_epoch=0", "run.warmup_steps=-3"],
    ),
    Bad(
        "a required key unset",
        ["run.init_lr: missing; it has no default"],
        text=("  init_lr: 3e-5\n", ""),
    ),
    Bad(
        "an interpolation that leads nowhere",
        ["model.ckpt: Interpolation key 'env.chache_root' not found (--options)"],
        ["model.ckpt=${env.chache_root}/x.pth"],
    ),
    Bad(
        "unknown architecture",
        [
            "model.arch: unknown model architecture 'minigpt5'; known: mini_gpt4, minigpt4, minigpt_v2. Did you mean 'minigpt4'? Add one in minigpt4/models/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["model.arch=minigpt5"],
    ),
    Bad(
        "unknown model type",
        [
            "model.model_type: unknown type 'pretrain_vicuna1' of mini_gpt4. Did you mean 'pretrain_vicuna'? (--options)"
        ],
        ["model.model_type=pretrain_vicuna1"],
    ),
    Bad(
        "unknown builder of own data",
        [
            f"datasets.cc_sbu_align.builder: unknown dataset builder 'image_text_json'; {KNOWN_BUILDERS} Did you mean 'image_text_jsonl'? Add one in minigpt4/datasets/builders/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["datasets.cc_sbu_align.builder=image_text_json"],
    ),
    Bad(
        "own data: no file",
        [
            f"{OWN_STORAGE}: nothing at '{{tmp}}/own/x.jsonl'; expected the path of an annotation file (--options)"
        ],
        text=JSONL,
        make=own("x.jsonl", None),
    ),
    Bad(
        "own data: no captions",
        [
            f'{OWN_STORAGE}: \'{{tmp}}/own\' has no caption for its 1 images; expected a .txt file beside each (first: a.txt), or captions.jsonl with {{"image": path, "caption": text}} a line (--options)'
        ],
        text=FOLDER,
        make=own("", None),
    ),
    Bad(
        "own data: a path that leads out",
        [
            f"{OWN_STORAGE}: x.jsonl line 2: '../../secret.jpg' leads out of the image folder '{{tmp}}/own'; write paths without '..' that start from one folder with all images, links out of it not followed, and name that folder (--options)"
        ],
        text=JSONL,
        make=own(
            "x.jsonl",
            '{"image": "a.jpg", "caption": "x"}\n{"image": "../../secret.jpg", "caption": "x"}',
        ),
    ),
    Bad(
        "own data: another shape",
        [
            f'{OWN_STORAGE}: {{tmp}}/own/x.jsonl: none of its 1 records can be used; x.jsonl line 2: \'caption\' is missing (keys: image, title); expected {{"image": path, "caption": text}} or {{"image": path, "conversations": [{{"from": "human", "value": text}}, {{"from": "gpt", "value": text}}, ..]}} (--options)'
        ],
        text=JSONL,
        make=own("x.jsonl", '\n{"image": "a.jpg", "title": "x"}'),
    ),
    Bad(
        "own data: a conversation without a template",
        [
            "error: model.prompt_template: '' cannot tell the questions of a conversation from its answers; set the LLM's own, e.g. '###Human: {} ###Assistant: ' for Vicuna v0, or use data with captions alone"
        ],
        ["model.prompt_template=", "model.prompt_path="],
        text=JSONL,
        make=own(
            "x.jsonl", '{"image": "a.jpg", "caption": "Red.", "instruction": "Which colour?"}'
        ),
        code=1,
    ),
    Bad(
        "unknown dataset",
        [
            f"datasets.cc_sbu_alignn: unknown dataset builder 'cc_sbu_alignn'; {KNOWN_BUILDERS} Did you mean 'cc_sbu_align'? Add one in minigpt4/datasets/builders/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows; a section of any other name needs the key datasets.cc_sbu_alignn.builder (config.yaml line 14)"
        ],
        text=("cc_sbu_align:", "cc_sbu_alignn:"),
    ),
    Bad(
        "unknown processor",
        [
            "datasets.cc_sbu_align.vis_processor.train.name: unknown processor 'blip3_image_train'; known: blip2_image_eval, blip2_image_train, blip_caption. Did you mean 'blip2_image_train'? Add one in minigpt4/processors/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["datasets.cc_sbu_align.vis_processor.train.name=blip3_image_train"],
    ),
    Bad(
        "unknown processor key",
        [
            "datasets.cc_sbu_align.vis_processor.train.image_sise: unknown key. Did you mean 'image_size'? (--options)"
        ],
        ["datasets.cc_sbu_align.vis_processor.train.image_sise=84"],
    ),
    Bad(
        "unknown task",
        [
            "run.task: unknown task 'image_text_pretrian'; known: image_text_pretrain. Did you mean 'image_text_pretrain'? Add one in minigpt4/tasks/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["run.task=image_text_pretrian"],
    ),
    Bad(
        "unknown runner",
        [
            "run.runner: unknown runner 'runner_iter'; known: runner_base. Did you mean 'runner_base'? Add one in minigpt4/runners/__init__.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["run.runner=runner_iter"],
    ),
    Bad(
        "unknown schedule",
        [
            "run.lr_sched: unknown learning-rate schedule 'cosine'; known: linear_warmup_cosine_lr, linear_warmup_step_lr. Add one in minigpt4/common/optims.py, or in a module of your own that the configuration names under imports: [my_package.my_module], as docs/custom_data.md shows (--options)"
        ],
        ["run.lr_sched=cosine"],
    ),
    Bad(
        "an option without a value",
        ["--options: 'run.max_epoch' has no '='; write every item as KEY=VALUE"],
        ["run.max_epoch"],
    ),
    Bad(
        "several at once",
        [
            "model.freez_vit: unknown key. Did you mean 'freeze_vit'? (--options)",
            "run.seed: 'x' (str) is not an integer (--options)",
        ],
        ["model.freez_vit=True", "run.seed=x"],
    ),
    Bad(
        "CUDA without a GPU",
        ["run.device: 'cuda' but torch sees no GPU; use --options run.device=cpu (--options)"],
        ["run.device=cuda"],
    ),
    Bad(
        "no such device",
        ["run.device: 'tpu' is no device; give auto, cpu, cuda, cuda:<index> or mps (--options)"],
        ["run.device=tpu"],
    ),
    # paths and files
    Bad(
        "placeholders left in",
        [
            "model.llama_model: '/path/to/vicuna/weights/' is the placeholder of the shipped file; set it to your own path (--options)",
            "model.ckpt: '/path/to/stage1/checkpoint/' is the placeholder of the shipped file; set it to your own path (--options)",
        ],
        ["model.llama_model=/path/to/vicuna/weights/", "model.ckpt=/path/to/stage1/checkpoint/"],
    ),
    Bad(
        "no LLM folder",
        [
            "model.llama_model: no transformers model in '{tmp}/nowhere' (config.json is not there); give the folder with config.json, weights and tokenizer (--options)"
        ],
        ["model.llama_model={tmp}/nowhere"],
    ),
    Bad(
        "no checkpoint",
        [
            "model.ckpt: no file at '{tmp}/nowhere.pth' (found nothing); give the path of the file or its URL (--options)"
        ],
        ["model.ckpt={tmp}/nowhere.pth"],
    ),
    Bad(
        "a folder as checkpoint",
        [
            "model.ckpt: no file at '{tmp}' (found a folder); give the path of the file or its URL (--options)"
        ],
        ["model.ckpt={tmp}"],
    ),
    Bad(
        "weights in the folder's old place",
        [
            "model.vit_ckpt: no file at 'minigpt4/embedded/weights/eva_vit.safetensors' (found nothing); the folder minigpt4/embedded is now minigpt4/quickstart (--options)"
        ],
        ["model.vit_ckpt=minigpt4/embedded/weights/eva_vit.safetensors"],
    ),
    Bad(
        "no checkpoint to resume",
        [
            "run.resume_ckpt_path: no file at '{tmp}/nowhere.pth' (found nothing); give the path of the file or its URL (--options)"
        ],
        ["run.resume_ckpt_path={tmp}/nowhere.pth"],
    ),
    Bad(
        "no prompt file",
        [
            "model.prompt_path: no file at 'prompts/nowhere.txt'; paths start from the current folder, or that of the YAML file (--options)"
        ],
        ["model.prompt_path=prompts/nowhere.txt"],
    ),
    Bad(
        "a prompt without an image",
        [
            "model.prompt_path: no line of '{tmp}/prompts.txt' has <ImageHere>; every prompt needs exactly one (--options)"
        ],
        make=prompts("Describe it.\n"),
    ),
    Bad(
        "a prompt with two images",
        [
            "model.prompt_path: '{tmp}/prompts.txt' line 2 has 2 <ImageHere>; every prompt needs exactly one (--options)"
        ],
        make=prompts("<Img><ImageHere></Img> a\n<Img><ImageHere><ImageHere></Img> b\n"),
    ),
    Bad(
        "a template without a place",
        [
            "model.prompt_template: '###Human: ###Assistant: ' has 0 {}; expected exactly one, where the prompt goes (--options)"
        ],
        ["model.prompt_template=###Human: ###Assistant: "],
    ),
    Bad(
        "no shard",
        [
            "datasets.laion.build_info.storage: no file matches '{tmp}/{00000..00002}.tar' (first missing: {tmp}/00000.tar) (--options)"
        ],
        ["datasets.laion.build_info.storage={tmp}/{00000..00002}.tar"],
        yaml=STAGE_1,
    ),
    Bad(
        "a shard missing",
        [
            "datasets.laion.build_info.storage: 2 of 4 shards are missing (first missing: {root}/laion_dataset/00002.tar) (--options)"
        ],
        ["datasets.laion.build_info.storage={root}/laion_dataset/{00000..00003}.tar"],
        yaml=STAGE_1,
    ),
    Bad(
        "a shell as shard",
        [
            "datasets.laion.build_info.storage: 'pipe:cat x.tar': 'pipe:' is refused; shards are local files, http(s) URLs, or addresses of an object store: s3://, gs://, hf:// (--options)"
        ],
        ["datasets.laion.build_info.storage=pipe:cat x.tar"],
        yaml=STAGE_1,
    ),
    Bad(
        "no folder of annotations",
        [
            "datasets.cc_sbu_align.build_info.storage: no folder at '{tmp}/nowhere'; expected one with filter_cap.json and image/ (--options)"
        ],
        ["datasets.cc_sbu_align.build_info.storage={tmp}/nowhere"],
    ),
    Bad(
        "no annotations",
        [
            "datasets.cc_sbu_align.build_info.storage: '{tmp}/align' has no filter_cap.json (--options)"
        ],
        make=align(lambda folder: (folder / "filter_cap.json").unlink()),
    ),
    Bad(
        "annotations that are no JSON",
        [
            "datasets.cc_sbu_align.build_info.storage: {tmp}/align/filter_cap.json: not valid JSON in UTF-8 (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)) (--options)"
        ],
        make=annotations("{"),
    ),
    Bad(
        "annotations of another form",
        [
            'datasets.cc_sbu_align.build_info.storage: {tmp}/align/filter_cap.json: found images; expected {"annotations": [{"image_id": ..., "caption": ...}]} (--options)'
        ],
        make=annotations('{"images": []}'),
    ),
    Bad(
        "annotations without a record",
        [
            "datasets.cc_sbu_align.build_info.storage: {tmp}/align/filter_cap.json: 'annotations' is empty; expected at least one record (--options)"
        ],
        make=records(),
    ),
    Bad(
        "a record without a caption",
        [
            "datasets.cc_sbu_align.build_info.storage: {tmp}/align/filter_cap.json: record 1: 'caption' is None; expected text (--options)"
        ],
        make=records({"image_id": "0", "caption": "a"}, {"image_id": "1"}),
    ),
    Bad(
        "a record that leads out",
        [
            "datasets.cc_sbu_align.build_info.storage: {tmp}/align/filter_cap.json: record 0: image_id '../../etc/passwd' leads out of the image folder; expected a file's stem (--options)"
        ],
        make=records({"image_id": "../../etc/passwd", "caption": "a"}),
    ),
    # data that turns out bad
    Bad(
        "images that are not there",
        [
            "datasets.cc_sbu_align.build_info.storage: '{tmp}/align/image' has no 7.jpg, nor any other of 1 that were looked for (--options)"
        ],
        make=records({"image_id": "7", "caption": "a"}),
    ),
    Bad(
        "images that are no images",
        [
            "error: cc_sbu_align: 3 of the first 3 samples were unusable (3 bad_image; last: 1 UnidentifiedImageError: cannot identify image file as JPEG, PNG, WEBP, GIF, BMP, TIFF); see dataset/README_2_STAGE.md"
        ],
        make=align(break_images),
        code=1,
    ),
    Bad(
        "a shard that is no tar",
        [
            "datasets.laion.build_info.storage: the shard cannot be read: '{tmp}/bad/00000.tar': a web page or XML (the download went wrong); expected a tar archive (--options)"
        ],
        make=shards(lambda f: (f / "00000.tar").write_text("<html>")),
        yaml=STAGE_1,
    ),
    Bad(
        "an empty shard",
        [
            "error: laion: 1 of the first 1 samples were unusable (1 bad_shard; last: {tmp}/bad/00000.tar ValueError: the shard is empty); see dataset/README_1_STAGE.md"
        ],
        make=shard_of(),
        yaml=STAGE_1,
        code=1,
    ),
    Bad(
        "a shard without captions",
        [
            "error: laion: 1 of the first 1 samples had no 'jpg' + 'json' pair (first keys: jpg); see dataset/README_1_STAGE.md"
        ],
        make=shard_of(("0.jpg", JPEG)),
        yaml=STAGE_1,
        code=1,
    ),
    Bad(
        "a shard without images",
        [
            "error: laion: 1 of the first 1 samples had no 'jpg' + 'json' pair (first keys: json); see dataset/README_1_STAGE.md"
        ],
        make=shard_of(("0.json", b'{"caption": "a"}')),
        yaml=STAGE_1,
        code=1,
    ),
    Bad(
        "captions that are none",
        [
            "error: laion: 1 of the first 1 samples were unusable (1 bad_caption; last: 00000.tar 0 caption is null); see dataset/README_1_STAGE.md"
        ],
        make=shard_of(("0.jpg", JPEG), ("0.json", b'{"caption": null}')),
        yaml=STAGE_1,
        code=1,
    ),
    Bad(
        "a pickle in a shard",
        [
            "error: laion: 1 of the first 1 samples had no 'jpg' + 'json' pair (first keys: jpg, pyd); see dataset/README_1_STAGE.md"
        ],
        make=shard_of(("0.jpg", JPEG), ("0.pyd", b"cos\nsystem\n.")),
        yaml=STAGE_1,
        code=1,
    ),
    # weights
    Bad(
        "a web page as checkpoint",
        [
            "model.ckpt: '{tmp}/bad.pth' is an HTML page, not weights: the download went wrong. Delete it and download it again (--options)"
        ],
        make=checkpoint(html_page),
    ),
    Bad(
        "Git LFS pointers as weights",
        [
            "model.ckpt: '{tmp}/bad.pth' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (--options)",
            "model.llama_model: '{tmp}/llm/model.safetensors' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (--options)",
        ],
        make=lambda tmp, release: [
            *checkpoint(lfs_pointer)(tmp, release),
            *llm_file("model.safetensors", POINTER)(tmp, release),
        ],
    ),
    Bad(
        "a Git LFS pointer as tokenizer",
        [
            "model.llama_model: '{tmp}/llm/tokenizer.json' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (--options)"
        ],
        make=llm_file("tokenizer.json", POINTER),
    ),
    Bad(
        "a Git LFS pointer as Q-Former",
        [
            "model.q_former_model: '{tmp}/blip2_pretrained_flant5xxl.pth' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (--options)"
        ],
        make=vision("q_former_model", lfs_pointer, "blip2_pretrained_flant5xxl"),
    ),
    Bad(
        "a Git LFS pointer to resume from",
        [
            "run.resume_ckpt_path: '{tmp}/bad.pth' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (--options)"
        ],
        make=lambda tmp, release: [
            o.replace("model.ckpt", "run.resume_ckpt_path")
            for o in checkpoint(lfs_pointer)(tmp, release)
        ],
    ),
    Bad(
        "an error page of XML as checkpoint",
        [
            "model.ckpt: '{tmp}/bad.pth' is text, not weights (it begins with '<?xml version=\"1.0\"?><Error><Code>Access'): the download went wrong. Delete it and download it again (--options)"
        ],
        make=checkpoint(
            lambda path: path.write_text(
                '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'
            )
        ),
    ),
    Bad(
        "an error of JSON as checkpoint",
        [
            "model.ckpt: '{tmp}/bad.pth' is text, not weights (it begins with '{\"error\":\"Repository not found\"}'): the download went wrong. Delete it and download it again (--options)"
        ],
        make=checkpoint(lambda path: path.write_text('{"error":"Repository not found"}')),
    ),
    Bad(
        "a picture as checkpoint",
        [
            "model.ckpt: '{tmp}/bad.pth' is no file of torch or safetensors (it begins with b'\\x89PNG\\r\\n\\x1a\\n'): the download went wrong. Delete it and download it again (--options)"
        ],
        make=checkpoint(lambda path: Image.new("RGB", (9, 9)).save(path, "PNG")),
    ),
    Bad(
        "an empty file as checkpoint",
        [
            "model.ckpt: '{tmp}/bad.pth' is empty: the download went wrong. Delete it and download it again (--options)"
        ],
        make=checkpoint(Path.touch),
    ),
    Bad(
        "an LLM cut off",
        [
            "model.llama_model: '{tmp}/llm/model.safetensors' is damaged or cut off (Error while deserializing header: incomplete metadata, file not fully covered); copy it again (--options)"
        ],
        make=llm(lambda folder: os.truncate(folder / "model.safetensors", 9000)),
    ),
    Bad(
        "an LLM without weights",
        [
            "model.llama_model: '{tmp}/llm' has no weights (model.safetensors or pytorch_model.bin, or shards); give the folder with config.json, weights and tokenizer (--options)"
        ],
        make=llm(lambda folder: (folder / "model.safetensors").unlink()),
    ),
    Bad(
        "a shard of the LLM missing",
        [
            "model.llama_model: '{tmp}/llm/b.safetensors' is not there, and the index beside it names it; copy all shards of the model there (--options)"
        ],
        make=llm(in_shards),
    ),
    Bad(
        "an LLM without tokenizer",
        ["error: model.llama_model: transformers cannot read the tokenizer of '{tmp}/llm' ("],
        make=llm(lambda folder: [path.unlink() for path in folder.glob("*token*")]),
        code=1,
        is_beginning=True,
    ),
    Bad(
        "an LLM without its tokenizer's words",
        [
            "error: model.llama_model: transformers cannot read the tokenizer of '{tmp}/llm' (ValueError: it knows no words; is tokenizer.json or tokenizer.model there?); give a folder of a family that transformers knows, with config.json, weights and tokenizer"
        ],
        make=llm(
            lambda folder: [(folder / f"tokenizer.{kind}").unlink() for kind in ("json", "model")]
        ),
        code=1,
    ),
    Bad(
        "an LLM of an unknown family",
        [
            "error: model.llama_model: transformers cannot read config.json of '{tmp}/llm' (ValueError: "
        ],
        make=llm_config(model_type="no_such_family"),
        code=1,
        is_beginning=True,
    ),
    Bad(
        "an LLM that brings code",
        [
            "error: model.llama_model: transformers cannot read config.json of '{tmp}/llm' (it needs code that lies in the folder (auto_map), and such code is never run); give a folder of a family that transformers knows, with config.json, weights and tokenizer"
        ],
        make=llm_config(
            model_type="evil",
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        ),
        code=1,
    ),
    Bad(
        "an LLM whose weights are of another size",
        [
            "error: model.llama_model: the weight files in '{tmp}/llm' are of another model than its config.json: 6 tensors are of another shape (model.layers.0.mlp.down_proj.weight is [64, 112], expected [64, 17]); copy both from one place"
        ],
        make=llm_config(intermediate_size=17),
        code=1,
    ),
    Bad(
        "an output folder that is a file",
        [
            "run.output_dir: '{tmp}/bad.pth' is no folder; give one, which is made if it is not there (--options)"
        ],
        make=lambda tmp, release: [
            *checkpoint(lambda path: write_checkpoint(path, 40, 64))(tmp, release),
            f"run.output_dir={tmp}/bad.pth/out",
        ],
    ),
    Bad(
        "a validation split that no dataset has",
        [
            "error: run.valid_splits, run.test_splits: no dataset has a split 'val' (there are: cc_sbu_align: train)"
        ],
        ["run.valid_splits=[val]", "run.batch_size_eval=2"],
        code=1,
    ),
    Bad(
        "a pickle that runs code",
        [
            "error: model.ckpt: '{tmp}/bad.pth' holds more than tensors and plain values, and was not opened, for such a file can run code. Use the released file, or save its state dict alone"
        ],
        make=checkpoint(payload),
        code=1,
    ),
    Bad(
        "a checkpoint cut off",
        [
            "error: model.ckpt: '{tmp}/bad.pth' is damaged or no file of torch ([Errno 22] Invalid argument). Use the released file, or save its state dict alone"
        ],
        make=checkpoint(truncated),
        code=1,
    ),
    Bad(
        "a checkpoint of another LLM",
        [
            "error: model.ckpt: '{tmp}/bad.pth' was trained for a 5120-wide LLM (13B), model.llama_model is 64 wide; give a checkpoint and an LLM of one size"
        ],
        make=checkpoint(lambda path: write_checkpoint(path, 40, 5120)),
        code=1,
    ),
    Bad(
        "a checkpoint of another Q-Former",
        [
            "error: model.ckpt: '{tmp}/bad.pth' projects image vectors of width 768, the model has 40-wide ones: those of a Q-Former are narrow (40), merged patches wide (768); set model.has_qformer as it was trained"
        ],
        make=checkpoint(lambda path: write_checkpoint(path, 768, 64)),
        code=1,
    ),
    Bad(
        "a tensor renamed",
        [
            "error: model.ckpt: '{tmp}/bad.pth' does not fit: 1 tensor is missing (llama_proj.weight [64, 40]); 1 tensor is unknown (proj.weight [64, 40])"
        ],
        make=checkpoint(renamed),
        code=1,
    ),
    Bad(
        "a tensor missing",
        [
            "error: model.ckpt: '{tmp}/bad.pth' does not fit: 1 tensor is missing (llama_proj.bias [64])"
        ],
        make=checkpoint(without_bias),
        code=1,
    ),
    Bad(
        "a tensor too many",
        [
            "error: model.ckpt: '{tmp}/bad.pth' does not fit: 1 tensor is of another shape (llama_model.lm_head.weight is [3, 3], expected [900, 64])"
        ],
        make=checkpoint(with_more),
        code=1,
    ),
    Bad(
        "weights of nan",
        [
            "error: model.ckpt: '{tmp}/bad.pth' holds numbers that are not finite: 1 tensor is bad (llama_proj.bias). The training that wrote it had failed, or the file is damaged; use an earlier checkpoint"
        ],
        make=checkpoint(with_nan),
        code=1,
    ),
    Bad(
        "a wrapped model's names",
        [
            "error: model.ckpt: '{tmp}/bad.pth' does not fit: 2 tensors are missing (llama_proj.weight [64, 40], llama_proj.bias [64]); 2 tensors are unknown (module.llama_proj.weight [64, 40], module.llama_proj.bias [64]). Its names begin with 'module.': it was saved from a wrapped model; save model.module.state_dict()"
        ],
        make=checkpoint(wrapped),
        code=1,
    ),
    Bad(
        "an empty checkpoint",
        [
            "error: model.ckpt: '{tmp}/bad.pth' does not fit: 2 tensors are missing (llama_proj.weight [64, 40], llama_proj.bias [64]). The file is empty"
        ],
        make=checkpoint(lambda path: torch.save({"model": {}}, path)),
        code=1,
    ),
    Bad(
        "a list as checkpoint",
        [
            "error: model.ckpt: '{tmp}/bad.pth' is no file of weights (a list); expected names and tensors, below the key 'model'"
        ],
        make=checkpoint(lambda path: torch.save([1, 2], path)),
        code=1,
    ),
    Bad(
        "a ViT without a tensor",
        [
            "error: model.vit_ckpt: '{tmp}/eva_vit_g.pth' does not fit: 1 tensor is missing (blocks.0.norm1.weight [44]). Expected the ViT eva_clip_g of the 2023 release, or dimensions in '{tmp}/eva_vit_g.json'"
        ],
        make=vision("vit_ckpt", drop_tensor, "eva_vit_g"),
        code=1,
    ),
    Bad(
        "a web page as ViT",
        [
            "model.vit_ckpt: '{tmp}/eva_vit_g.pth' is an HTML page, not weights: the download went wrong. Delete it and download it again (--options)"
        ],
        make=vision("vit_ckpt", html_page, "eva_vit_g"),
    ),
    Bad(
        "a Q-Former without a tensor",
        [
            "error: model.q_former_model: '{tmp}/blip2_pretrained_flant5xxl.pth' does not fit: 1 tensor is missing (Qformer.bert.embeddings.LayerNorm.weight [40]). Expected the file of BLIP-2, or its dimensions in '{tmp}/blip2_pretrained_flant5xxl.json'"
        ],
        make=vision("q_former_model", drop_tensor, "blip2_pretrained_flant5xxl"),
        code=1,
    ),
    Bad(
        "another number of queries",
        [
            "error: model.q_former_model: '{root}/torch/hub/checkpoints/blip2_pretrained_flant5xxl.pth' does not fit: 1 tensor is of another shape (query_tokens is [1, 32, 40], expected [1, 16, 40]). Expected the file of BLIP-2, or its dimensions in '{root}/torch/hub/checkpoints/blip2_pretrained_flant5xxl.json'"
        ],
        ["model.num_query_token=16"],
        code=1,
    ),
    Bad(
        "LLM weights of noise",
        [
            "error: model.llama_model: '{tmp}/llm' does not read English: loss 6.80 a token on a plain paragraph; guessing among 900 tokens has 6.80 (10.375 in logs of LLaMA is such a guess). Most likely: a Vicuna delta that was not merged into LLaMA, wrong or half-copied weights, or a conversion gone wrong. To use it knowingly: --options model.check_llm=False"
        ],
        make=llm(scrambled),
        code=1,
    ),
    Bad(
        "a weights file for resuming",
        [
            "error: run.resume_ckpt_path: '{tmp}/weights.pth' has no optimizer, config, scaler, epoch (found: model); a training run is resumed from a checkpoint with model, optimizer, config, scaler, epoch. To start a new run from its weights, set model.ckpt instead"
        ],
        make=resume,
        code=1,
    ),
    Bad(
        "an image size of two minds",
        [
            "datasets.cc_sbu_align.vis_processor.train.image_size: 224, but the model takes images of 42 pixels; remove the line, or make it agree with model.image_size (config.yaml line 18)"
        ],
        ["model.image_size=42"],
        text=('"blip2_image_train"', '"blip2_image_train"\n        image_size: 224'),
    ),
]


def run(bad, release, tmp_path, capsys, *arguments):
    """Run train.py in this process on one row; return (exit code, what it printed on stderr)."""
    yaml = tmp_path / "config.yaml"
    source = Path(bad.yaml)
    if source.is_file():
        content = "" if bad.text is None else source.read_text()
        for old, new in [bad.text] if bad.text else []:
            assert old in content
            content = content.replace(old, new)
        yaml.write_text(content)
        source = yaml
    options = options_of(
        model__llama_model=release.llama, run__device="cpu", run__output_dir=tmp_path / "output"
    )
    options += ["run.num_workers=0", "run.iters_per_epoch=1", "run.max_epoch=1"]
    if bad.yaml == STAGE_1:
        places = {
            "laion": release.root / "laion_dataset",
            "cc_sbu": release.root / "cc_sbu_dataset",
        }
        options += [
            f"datasets.{n}.build_info.storage={p}/{{00000..00001}}.tar" for n, p in places.items()
        ]
        options += ["datasets.laion.sample_ratio=1000000"]
    elif bad.text != ("cc_sbu_align:", "cc_sbu_alignn:") and bad.text is not None:
        options += options_of(
            datasets__cc_sbu_align__build_info__storage=release.root / "cc_sbu_align"
        )
    if bad.yaml == STAGE_2 and bad.text is not None:
        options += options_of(model__ckpt=release.checkpoint)
    options += [
        o.replace("{tmp}", str(tmp_path)).replace("{root}", str(release.root)) for o in bad.options
    ]
    options += bad.make(tmp_path, release) if bad.make else []
    code = run_program(
        train.train,
        train.parse_args([*arguments, "--cfg-path", str(source), "--options", *options]),
    )
    return code, capsys.readouterr().err


# what only the samples themselves, or the LLM at work, can tell: --dry-run reads neither
ONLY_TRAINING_TELLS = (
    "own data: a conversation without a template",
    "images that are not there",
    "images that are no images",
    "an empty shard",
    "a shard without captions",
    "a shard without images",
    "captions that are none",
    "a pickle in a shard",
    "an LLM whose weights are of another size",
    "LLM weights of noise",
)
EARLY = [bad for bad in ROWS if bad.code == 1 and bad.name not in ONLY_TRAINING_TELLS]


def check(bad, code, said, release, tmp_path):
    assert code == bad.code
    assert "Traceback" not in said
    said = said.replace(str(tmp_path), "{tmp}").replace(str(release.root), "{root}")
    lines = [line.strip() for line in said.splitlines()]
    for message in bad.messages:
        is_there = message in lines or (
            bad.is_beginning and any(line.startswith(message) for line in lines)
        )
        assert is_there, said
    assert bad.messages
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("checkpoint_*"))
    assert not list(tmp_path.rglob("executed")) and not Path("executed").exists()


@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: bad.name)
def test_a_mistake_ends_in_its_message(bad, release, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    check(bad, *run(bad, release, tmp_path, capsys), release, tmp_path)


@pytest.mark.parametrize("bad", EARLY, ids=lambda bad: bad.name)
def test_a_dry_run_says_it_too(bad, release, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    check(bad, *run(bad, release, tmp_path, capsys, "--dry-run"), release, tmp_path)
