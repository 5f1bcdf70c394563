"""The training loop: one epoch, its steps and optimizer updates, and the state that they use."""

from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from minigpt4.common.config import Config
from minigpt4.common.device import to_device
from minigpt4.common.dist_utils import average_gradients, broadcast_tensors, max_over_ranks
from minigpt4.common.launchers import run_device
from minigpt4.common.logger import MetricLogger, batch_size
from minigpt4.common.optims import build_optimizer
from minigpt4.common.startup import startup
from minigpt4.models.llm import sharding
from minigpt4.runners.interruption import Interruption
from minigpt4.runners.step_timeout import StepTimeout


class TrainingLoop:
    """Trains `model` with the loss that `task.loss_and_targets(model, batch)` gives."""

    def __init__(self, cfg: Config, task: Any, model: Any) -> None:
        self.run_cfg, self.task = cfg.run_cfg, task
        self.device = run_device(self.run_cfg)
        self.model = model if model.device == self.device else model.to(self.device)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        broadcast_tensors([parameter.data for parameter in self.trainable])
        self.optimizer = self.scaler = None
        if not self.run_cfg.evaluate:
            self.optimizer = build_optimizer(self.model, self.run_cfg, self.device)
            is_half = (
                self.run_cfg.amp
                and self.device.type == "cuda"
                and model.compute_dtype == torch.float16
            )
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_half)
        self.interruption = Interruption()
        self.step_timeout = StepTimeout(self.run_cfg.step_timeout_s)
        # set once the data is open: this rank's endless batches, the steps of an epoch, the schedule
        self.train_loader = self.iters_per_epoch = self.lr_scheduler = None

    def train_epoch(self, epoch: int, metrics: MetricLogger) -> dict[str, float]:
        """Train from step `metrics.index` on; return the epoch's {"lr", "loss"}, means over all ranks.

        An update (optimizer step) combines the gradients of `accum_grad_iters` batches of all ranks by `accum_reduction`.
        tokens: the gradient of the mean over all their target tokens, as of one large batch. mean: the mean of the
        batches' gradients. sum: their sum, averaged over ranks (Source: 2023 release). The last update of an epoch takes
        the batches that are left; with `sum` they go into the first update of the next epoch. Raises NonFiniteLossError.
        """
        num_steps, accum = self.iters_per_epoch, self.run_cfg.accum_grad_iters
        reduction, limit = self.run_cfg.accum_reduction, self.run_cfg.max_tokens_per_batch
        num_bad = weight = 0  # since the last update: non-finite losses, target tokens
        self.model.train()
        startup.begin("first step")
        for step in range(metrics.index, num_steps):
            # batch, with the keys that the 2023 release adds
            lr = self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            with metrics.fetching(), startup.phase("first batch"):
                batch = to_device(next(self.train_loader), self.device)
            batch |= {"epoch": epoch, "num_iters_per_epoch": num_steps, "iters": step}

            # gradient, accumulated since the last update; a batch above `max_tokens_per_batch` runs in
            # parts, whose losses times their shares add up to the batch's loss
            window = min(accum, num_steps - step + step % accum) if reduction == "mean" else 1
            loss, tokens_before = 0, self.model.tokens_read
            parts = [(batch, 1)] if limit is None else self.model.split(batch, limit)
            num_extra = self.begin_passes(len(parts))
            for part, share in parts:
                part_loss, num_targets = self.task.loss_and_targets(self.model, part)
                loss = loss + part_loss.detach() * share
                if reduction == "tokens":
                    # reweight, so that the gradient is that of the mean over all targets so far
                    before, weight = weight, weight + (num_targets or share * batch_size(batch))
                    self.scale_gradients(before / weight)
                    part_loss = part_loss * ((weight - before) / weight)
                else:
                    part_loss = part_loss * share / window
                self.scaler.scale(part_loss).backward()
            metrics.add(loss, lr, batch, self.model.tokens_read - tokens_before)
            # passes of weight 0, for ranks with more parts, which need this rank's LLM shards
            for _ in range(num_extra):
                (self.task.loss_and_targets(self.model, part)[0] * 0).backward()
            num_bad = num_bad + (~loss.isfinite()).float()

            # update
            is_update = (step + 1) % accum == 0 or (reduction != "sum" and step + 1 == num_steps)
            if is_update:
                is_skipped, ranks_interrupted = self.update(num_bad, weight or 1)
                metrics.updated(is_skipped)
                num_bad = weight = 0

            # metrics
            metrics.check()  # waits for the device if a progress line is due
            metrics.end_step()
            startup.finish()
            if is_update:
                self.after_step(epoch, metrics, ranks_interrupted)
        return metrics.end_epoch()

    def begin_passes(self, number: int) -> int:
        """Return how many passes beyond `number` this rank must make in this step: each of a sharded LLM needs all ranks."""
        if not sharding.is_sharded(self.model):
            return 0
        self.step_timeout.arrived()  # each pass waits for the other ranks
        if self.run_cfg.max_tokens_per_batch is None:  # one pass on every rank
            return 0
        return max_over_ranks(number, self.device) - number

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients, if there are any."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def update(self, num_bad: torch.Tensor, weight: float = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Step the optimizer with the mean gradient of all ranks, each weighted by its `weight`.

        The step is skipped if the gradient or a loss (`num_bad` of this rank) is not finite. Return (whether it was
        skipped, not only for the scale of float16; how many ranks want to end the run), equal on all ranks.
        """
        # sum over ranks: [non-finite losses, ranks that got a signal]
        flags = torch.stack([num_bad, num_bad.new_full((), self.interruption.signal is not None)])
        self.step_timeout.arrived()
        average_gradients(self.trainable, flags, weight)

        # clip; without a limit only the norm is computed
        limit, is_scaling = self.run_cfg.max_grad_norm, self.scaler.is_enabled()
        if limit is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.trainable, float("inf") if limit is None else limit)

        # An enabled scaler checks for infinities itself, and expects some while it looks for its scale;
        # at a scale of 1 or less, which is 1 without it, they are not due to the scale.
        # On CUDA the fused optimizer skips the step if `found_inf` is set: no need to wait for the device.
        is_searching = self.scaler.scale(torch.ones_like(norm)) > 1
        is_skipped = (flags[0] > 0) | (~norm.isfinite() & ~is_searching)
        if is_scaling or self.device.type == "cuda":
            if not is_scaling:
                self.optimizer.found_inf = is_skipped.float()
            self.scaler.step(self.optimizer)
        elif not is_skipped:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return is_skipped, flags[1]

    def after_step(
        self, epoch: int, metrics: MetricLogger, ranks_interrupted: torch.Tensor
    ) -> None:
        """Hook, called after each update, when no accumulated gradients remain."""
