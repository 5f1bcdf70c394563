"""The training loop: an epoch and its steps, beside the state that they read and change."""

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
        self.optimizer = self.scaler = None  # to evaluate, none is needed
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
        # known once the data is open: endless batches of this rank, the length of an epoch, the lr
        self.train_loader = self.iters_per_epoch = self.lr_scheduler = None

    def train_epoch(self, epoch: int, metrics: MetricLogger) -> dict[str, float]:
        """Train from step `metrics.index` on; return the epoch's {"lr", "loss"}, means over all ranks.

        An update takes the gradients of `accum_grad_iters` batches of all ranks; `accum_reduction` says how:
        tokens: of the mean over all their target tokens, as of one large batch. mean: the mean of their own
        means. sum: their sum, and the mean over ranks (Source: 2023 release). The last update of an epoch takes
        what is left; with `sum` that goes into the first one of the next. Raises NonFiniteLossError.
        """
        num_steps, accum = self.iters_per_epoch, self.run_cfg.accum_grad_iters
        reduction, limit = self.run_cfg.accum_reduction, self.run_cfg.max_tokens_per_batch
        num_bad = weight = 0  # since the last update: losses that are not finite, target tokens
        self.model.train()
        startup.begin("first step")
        for step in range(metrics.index, num_steps):
            # batch
            lr = self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            with metrics.fetching(), startup.phase("first batch"):
                batch = to_device(next(self.train_loader), self.device)
            # 2023's names
            batch |= {"epoch": epoch, "num_iters_per_epoch": num_steps, "iters": step}

            # gradient, added to those since the last update; a batch of too many tokens goes in parts,
            # whose losses times their shares add up to its own
            window = min(accum, num_steps - step + step % accum) if reduction == "mean" else 1
            loss, tokens_before = 0, self.model.tokens_read
            parts = [(batch, 1)] if limit is None else self.model.split(batch, limit)
            missing = self.begin_passes(len(parts))
            for part, share in parts:
                part_loss, num_targets = self.task.loss_and_targets(self.model, part)
                loss = loss + part_loss.detach() * share
                # with it the gradient is that of the mean over all so far
                if reduction == "tokens":
                    before, weight = weight, weight + (num_targets or share * batch_size(batch))
                    self.scale_gradients(before / weight)
                    part_loss = part_loss * ((weight - before) / weight)
                else:
                    part_loss = part_loss * share / window
                self.scaler.scale(part_loss).backward()
            metrics.add(loss, lr, batch, self.model.tokens_read - tokens_before)
            for _ in range(missing):  # for the weights that this rank holds; it counts nothing
                (self.task.loss_and_targets(self.model, part)[0] * 0).backward()
            num_bad = num_bad + (~loss.isfinite()).float()

            # update
            is_update = (step + 1) % accum == 0 or (reduction != "sum" and step + 1 == num_steps)
            if is_update:
                is_skipped, ranks_interrupted = self.update(num_bad, weight or 1)
                metrics.updated(is_skipped)
                num_bad = weight = 0

            # account
            metrics.check()  # waits for the device, when a line is due
            metrics.end_step()
            startup.finish()
            if is_update:
                self.after_step(epoch, metrics, ranks_interrupted)
        return metrics.end_epoch()

    def begin_passes(self, number: int) -> int:
        """Return how many passes of an LLM that ranks hold together another rank makes beyond `number` in this step."""
        if not sharding.is_sharded(self.model):
            return 0
        self.step_timeout.arrived()  # such a pass waits for the others
        is_alike = self.run_cfg.max_tokens_per_batch is None  # one pass on every rank
        return 0 if is_alike else max_over_ranks(number, self.device) - number

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients, if there are any."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def update(self, num_bad: torch.Tensor, weight: float = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Step the optimizer with the ranks' mean gradient, each of its `weight`, unless that or a loss is not finite.

        Return (whether it was skipped, how many ranks want to end the run), equal on all ranks.
        """
        # what one rank knows becomes what all know
        flags = torch.stack([num_bad, num_bad.new_full((), self.interruption.signal is not None)])
        self.step_timeout.arrived()
        average_gradients(self.trainable, flags, weight)

        # clipping; without a limit only the norm is computed
        limit, is_scaling = self.run_cfg.max_grad_norm, self.scaler.is_enabled()
        if limit is not None:
            self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.trainable, float("inf") if limit is None else limit)

        # A scaler that is enabled looks for infinities itself, and meets some while it finds its scale.
        # On CUDA the fused step does nothing where `found_inf` is set: no need to wait for it.
        is_skipped = (flags[0] > 0) | (~norm.isfinite() & (not is_scaling))
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
        """Hook: called after each update, where no gradient is left over."""
