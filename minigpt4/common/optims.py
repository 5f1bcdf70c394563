"""The learning rate of every step, by the two registered schedules, and the AdamW groups.

`epoch` and `step` count from 0, `step` inside its epoch. All lengths (`iters_per_epoch`, `warmup_steps`, `log_freq`,
`save_every_iters`) count steps, and every batch is one, also with accumulation, which updates at every
`accum_grad_iters`-th (Source: 2023 release).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig

from minigpt4.common.registry import registry

WARMUP_CLOCKS = ("epoch", "global")
_NO_DECAY = ("bias", "ln", "bn")  # anywhere in a parameter's name


class LRSchedule:
    """A schedule over `iters_per_epoch` steps an epoch, from the `run` section.

    `warmup_lr` below 0 means that warm-up starts at `init_lr`. `warmup_clock` says what warm-up counts: "epoch", the
    steps of the epoch (Source: 2023 release; a longer warm-up starts anew in each), or "global", those of training.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, run_cfg: DictConfig, iters_per_epoch: int
    ) -> None:
        self.optimizer, self.iters_per_epoch = optimizer, iters_per_epoch
        self.init_lr, self.min_lr = run_cfg.init_lr, run_cfg.min_lr
        self.warmup_start_lr = run_cfg.warmup_lr if run_cfg.warmup_lr >= 0 else run_cfg.init_lr
        self.warmup_steps, self.max_epoch = run_cfg.warmup_steps, run_cfg.max_epoch
        self.is_global, self.decay_rate = run_cfg.warmup_clock == "global", run_cfg.lr_decay_rate

    def lr(self, epoch: int, step: int) -> float:
        """Return the lr of one step."""
        raise NotImplementedError

    def step(self, cur_epoch: int, cur_step: int) -> float:
        """Set the lr of all parameter groups to that of the step to be made, and return it.

        Groups of a part with its own rate in `run.lr` have a multiple, "lr_scale", of it.
        """
        lr = self.lr(cur_epoch, cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def _warmup(self, epoch: int, step: int) -> float:
        """Return the lr of a warm-up step: a line from `warmup_lr`, capped at `init_lr`."""
        index = epoch * self.iters_per_epoch + step if self.is_global else step
        rise = (self.init_lr - self.warmup_start_lr) * index / max(self.warmup_steps, 1)
        return min(self.init_lr, self.warmup_start_lr + rise)


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLRScheduler(LRSchedule):
    """Warm-up for the first `warmup_steps` steps of training, then a cosine down to `min_lr`.

    With the "epoch" clock the cosine counts from the very first step, so the lr drops where warm-up ends (Source: the
    published logs); with the "global" clock it starts at `init_lr` there.
    """

    def lr(self, epoch: int, step: int) -> float:
        done, total = epoch * self.iters_per_epoch + step, self.max_epoch * self.iters_per_epoch
        if done < self.warmup_steps:
            return self._warmup(epoch, step)
        skipped = self.warmup_steps if self.is_global else 0
        cosine = math.cos(math.pi * (done - skipped) / (total - skipped))
        return self.min_lr + 0.5 * (self.init_lr - self.min_lr) * (1 + cosine)


@registry.register_lr_scheduler("linear_warmup_step_lr")
class LinearWarmupStepLRScheduler(LRSchedule):
    """Warm-up, then ``init_lr * lr_decay_rate ** epoch``, never below `min_lr`.

    With the "epoch" clock all of epoch 0 is warm-up, and no other.
    """

    def lr(self, epoch: int, step: int) -> float:
        done = epoch * self.iters_per_epoch + step
        if done < self.warmup_steps if self.is_global else epoch == 0:
            return self._warmup(epoch, step)
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)


def weight_decay_groups(
    model: torch.nn.Module, weight_decay: float, names: Iterable[str] | None = None
) -> list[dict]:
    """Return AdamW's two groups of trainable parameters, of those `names` alone if given: decayed, then not decayed.

    Not decayed: vectors and scalars, and names with `bias`, `ln` or `bn` anywhere in them. Both groups
    are there even if empty, so that all checkpoints have one form. Source: 2023 release.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (names is None or name in names):
            is_exempt = parameter.ndim < 2 or any(part in name for part in _NO_DECAY)
            (no_decay if is_exempt else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]


def rates(run_cfg: Any) -> dict[str, float]:
    """Return {part: its peak learning rate}: `run.lr`, and `init_lr` for parts that it leaves out."""
    own = run_cfg.get("lr") or {}
    return {part: run_cfg.init_lr if rate is None else rate for part, rate in own.items()}


def part_groups(model: torch.nn.Module, run_cfg: DictConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: the two of `weight_decay_groups` for each learning rate, those of `init_lr` first.

    A model with a `part_of(name)` says which part of `run.lr` a parameter belongs to.
    """
    own, names = rates(run_cfg), {run_cfg.init_lr: set()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = model.part_of(name) if own else None
            names.setdefault(own.get(part, run_cfg.init_lr), set()).add(name)
    groups = []
    for rate, chosen in names.items():
        pair = weight_decay_groups(model, run_cfg.weight_decay, chosen)
        groups += (
            pair
            if rate == run_cfg.init_lr
            else [group | {"lr_scale": rate / run_cfg.init_lr} for group in pair]
        )
    return groups


def build_optimizer(
    model: torch.nn.Module, run_cfg: DictConfig, device: torch.device
) -> torch.optim.AdamW:
    """Return AdamW over the model's trainable parameters, in its fused form on CUDA."""
    return torch.optim.AdamW(
        part_groups(model, run_cfg),
        lr=run_cfg.init_lr,
        betas=(0.9, run_cfg.beta2),
        eps=1e-8,
        fused=device.type == "cuda" or None,  # None: torch chooses
    )
