"""A small real model, fixed batches and settings, for tests of what trains it."""

import json
import os
import signal
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

from minigpt4.common.registry import registry
from minigpt4.models import BaseModel
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask

ROOT = Path(__file__).resolve().parents[1]
NUM_BATCHES, WIDTH = 5, 6


class TinyModel(BaseModel):
    """A frozen part with a buffer, dropout, and llama_proj, which alone learns to give the mean of `image`."""

    def __init__(self, dropout=0.0, frozen_value=0.5):
        super().__init__()
        self.visual_encoder = nn.Linear(WIDTH, WIDTH)
        self.visual_encoder.register_buffer("scale", torch.full((1,), frozen_value))
        for parameter in self.visual_encoder.parameters():
            nn.init.constant_(parameter, frozen_value)
        self.dropout = nn.Dropout(dropout)
        self.llama_proj = nn.Linear(WIDTH, 2)
        self.freeze("visual_encoder")

    def forward(self, samples):
        image = samples["image"].flatten(1)[:, :WIDTH]
        features = self.dropout(image + 0.1 * self.visual_encoder(image))
        return {"loss": (self.llama_proj(features) - image.mean(1, keepdim=True)).square().mean()}

    def split(self, samples, max_tokens):
        """A sample is a token here."""
        parts = samples["image"].split(max_tokens)
        return [
            ({"image": part, "text_input": [""] * len(part)}, len(part) / len(samples["image"]))
            for part in parts
        ]

    def trainable_state_dict(self):
        return {
            name: value
            for name, value in self.state_dict().items()
            if name.startswith("llama_proj")
        }

    def load_trainable(self, state, where, path=None):
        self.load_state_dict({**self.state_dict(), **state})


def batches(batch_size=4, number=NUM_BATCHES, seed=7, scale=1.0):
    """Return a list of fixed batches."""
    generator = torch.Generator().manual_seed(seed)
    images = scale * torch.randn(number * batch_size, WIDTH, generator=generator)
    return [
        {"image": chunk, "text_input": ["a"] * batch_size} for chunk in images.split(batch_size)
    ]


def endless(fixed, start=0):
    """Return an endless iterator over `fixed` that begins `start` batches later."""
    return islice(cycle(fixed), start, None)


def settings(output_dir, **changes):
    """Return a configuration whose `run` section trains in a moment on the CPU."""
    run = {
        "lr_sched": "linear_warmup_cosine_lr",
        "init_lr": 0.05,
        "min_lr": 0.005,
        "warmup_lr": 0.001,
        "warmup_steps": 3,
        "weight_decay": 0.05,
        "max_epoch": 2,
        "iters_per_epoch": 6,
        "batch_size_train": 4,
        "num_workers": 0,
        "output_dir": str(output_dir),
        "device": "cpu",
        "read_ahead": False,  # there are no weight files
        **changes,
    }
    run_cfg = OmegaConf.merge(OmegaConf.structured(RunnerBase.Config), run)
    return SimpleNamespace(
        run_cfg=run_cfg, to_dict=lambda: {"run": OmegaConf.to_container(run_cfg)}
    )


def dataset_sections(storages, processor):
    """Return the `datasets` section of shipped builders, {name: `build_info.storage`}, for images of 8 pixels."""
    sections = OmegaConf.create()
    for name, storage in storages.items():
        section = OmegaConf.structured(registry.get_builder_class(name).Config)
        section.build_info.storage = str(storage)
        section.vis_processor.train = {"name": processor, "image_size": 8}
        sections[name] = section
    return sections


def tiny_model(**kwargs):
    """Return the TinyModel that is the same for the same arguments."""
    torch.manual_seed(0)
    return TinyModel(**kwargs)


def runner(cfg, model=None, datasets=None, kind=RunnerBase):
    """Return the real runner, or one of another `kind`, and task around a model."""
    return kind(
        cfg=cfg, task=ImageTextPretrainTask(), model=model or tiny_model(), datasets=datasets or {}
    )


def trained(tmp_path, fixed=None, model=None, start=0, **changes):
    """Return the runner of a finished run on fixed batches."""
    run = runner(settings(tmp_path, **changes), model)
    run.train(endless(fixed or batches(), start))
    return run


def weights(run):
    """Return all that trains, as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in run.trainable])


def by_hand(groups, lr):
    """Return the weights after one AdamW step for each group of batches, of the mean of their losses."""
    model = tiny_model()
    decay = [{"params": [model.llama_proj.weight], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(
        [*decay, {"params": [model.llama_proj.bias], "weight_decay": 0.0}], lr=lr
    )
    for divisor, group in groups:
        optimizer.zero_grad()
        (sum(model(batch)["loss"] for batch in group) / divisor).backward()
        optimizer.step()
    return torch.cat([model.llama_proj.weight.detach().flatten(), model.llama_proj.bias.detach()])


class Images(Dataset):
    """Five samples with a name, as datasets of the package are."""

    name, sample_ratio = "images", None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "text_input": "a"}

    def bind(self, place, num_workers=0, max_bad_fraction=0.05):
        self.place = place


def torchrun(script, *args, timeout=240):
    """Run a script on two ranks; its processes end with the test, also if they hang. A busy machine takes its time."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    process = subprocess.Popen(
        [*command, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"two ranks did not end within {timeout} s:\n{output}")
    return process.returncode, output


def found_by_two_ranks(source, folder):
    """Return what each rank of the script `source` wrote to found_<rank>.json in `folder`, and what both said."""
    script = folder / "two_ranks.py"
    script.write_text(source)
    code, output = torchrun(script, folder)
    assert code == 0, output
    return *(json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)), output
