"""Learning-rate schedules and AdamW's parameter groups.

`epoch` and `step` count from 0, `step` within its epoch. All lengths (`iters_per_epoch`, `warmup_steps`, `log_freq`,
`save_every_iters`) count steps. Every batch is one step, also with gradient accumulation, where only every
`accum_grad_iters`-th step updates the weights (Source: 2023 release).
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

    `warmup_lr` below 0 means that warm-up starts at `init_lr`. `warmup_clock` says which steps warm-up counts: "epoch",
    those of the epoch (Source: 2023 release; a longer warm-up starts anew in each epoch), or "global", those of training.
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
        """Return the learning rate of one step."""
        raise NotImplementedError

    def step(self, cur_epoch: int, cur_step: int) -> float:
        """Set the learning rate of all parameter groups for the step that comes next, and return it.

        Groups of a part with its own rate in `run.lr` get a multiple of it, "lr_scale".
        """
        lr = self.lr(cur_epoch, cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        return lr

    def _warmup(self, epoch: int, step: int) -> float:
        """Return the learning rate of a warm-up step: linear from `warmup_lr`, capped at `init_lr`."""
        index = epoch * self.iters_per_epoch + step if self.is_global else step
        rise = (self.init_lr - self.warmup_start_lr) * index / max(self.warmup_steps, 1)
        return min(self.init_lr, self.warmup_start_lr + rise)


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLRScheduler(LRSchedule):
    """Warm-up for the first `warmup_steps` steps of training, then a cosine down to `min_lr`.

    With the "epoch" clock the cosine counts from the very first step, so the learning rate drops at the end of warm-up
    (Source: the published logs); with the "global" clock the cosine starts there, at `init_lr`.
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

    With the "epoch" clock, warm-up is exactly epoch 0.
    """

    def lr(self, epoch: int, step: int) -> float:
        done = epoch * self.iters_per_epoch + step
        is_warmup = done < self.warmup_steps if self.is_global else epoch == 0
        if is_warmup:
            return self._warmup(epoch, step)
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)


def weight_decay_groups(
    model: torch.nn.Module, weight_decay: float, names: Iterable[str] | None = None
) -> list[dict]:
    """Return AdamW's two groups of trainable parameters (only those in `names`, if given): with and without weight decay.

    Without: vectors, scalars, and parameters with `bias`, `ln` or `bn` anywhere in their names. Both
    groups are returned even if empty, so that all checkpoints have one form. Source: 2023 release.
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
    """Return {part: its peak learning rate} of all parts in `run.lr`; a rate of None there is `init_lr`."""
    own = run_cfg.get("lr") or {}
    return {part: run_cfg.init_lr if rate is None else rate for part, rate in own.items()}


def part_groups(model: torch.nn.Module, run_cfg: DictConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: the two of `weight_decay_groups` for each learning rate, those of `init_lr` first.

    If `run.lr` is used, the model's `part_of(name)` says which part a parameter belongs to.
    """
    rate_of_part = rates(run_cfg)
    names_of_rate = {run_cfg.init_lr: set()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = model.part_of(name) if rate_of_part else None
            rate = rate_of_part.get(part, run_cfg.init_lr)
            names_of_rate.setdefault(rate, set()).add(name)
    groups = []
    for rate, names in names_of_rate.items():
        pair = weight_decay_groups(model, run_cfg.weight_decay, names)
        if rate != run_cfg.init_lr:
            pair = [group | {"lr_scale": rate / run_cfg.init_lr} for group in pair]
        groups += pair
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
