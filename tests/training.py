"""A small real model, fixed batches and settings, for tests of what trains it."""

from itertools import cycle, islice
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from torch import nn

from minigpt4.models import BaseModel
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask

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
        return [({"image": part, "text_input": [""] * len(part)}, len(part) / len(samples["image"])) for part in parts]

    def trainable_state_dict(self):
        return {name: value for name, value in self.state_dict().items() if name.startswith("llama_proj")}

    def load_trainable(self, state, where, path=None):
        self.load_state_dict({**self.state_dict(), **state})


def batches(batch_size=4, number=NUM_BATCHES, seed=7, scale=1.0):
    """Return a list of fixed batches."""
    generator = torch.Generator().manual_seed(seed)
    images = scale * torch.randn(number * batch_size, WIDTH, generator=generator)
    return [{"image": chunk, "text_input": ["a"] * batch_size} for chunk in images.split(batch_size)]


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
    return SimpleNamespace(run_cfg=run_cfg, to_dict=lambda: {"run": OmegaConf.to_container(run_cfg)})


def tiny_model(**kwargs):
    """Return the TinyModel that is the same for the same arguments."""
    torch.manual_seed(0)
    return TinyModel(**kwargs)


def runner(cfg, model=None, datasets=None, kind=RunnerBase):
    """Return the real runner, or one of another `kind`, and task around a model."""
    return kind(cfg=cfg, task=ImageTextPretrainTask(), model=model or tiny_model(), datasets=datasets or {})
