"""The plan that `train.py --dry-run` prints: configuration, model parts, memory of a step, and how to save memory."""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch

from minigpt4.common.checkpoint import load_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.device import in_run_precision, total_memory_bytes
from minigpt4.common.launchers import launched_processes, run_device
from minigpt4.common.llm_shares import num_shares
from minigpt4.common.optims import rates
from minigpt4.common.registry import registry
from minigpt4.common.utils import cached_path, expand_path
from minigpt4.models.memory import OUTSIDE
from minigpt4.models.training_parts import mode_table, modes
from minigpt4.runners.run_config import best_metrics
from minigpt4.runners.run_folder import AUTO, BEST


def print_plan(
    cfg: Config, gpu_memory_gib: float | None = None, num_gpus: int | None = None
) -> int:
    """Print the checked configuration and what it would train: parts, precision, memory, length.

    Loads no weights, but reads enough of the weight files to see whether they fit; builds the datasets, but reads no
    sample. `gpu_memory_gib`: plan for a GPU of that size, whether this machine has one or not; `num_gpus`: plan for so
    many processes, one a GPU. Return 0, or 1 if a training step does not fit into memory. Raises ValueError or OSError
    for what would end a training at its start.
    """
    run, model_cfg = cfg.run_cfg, in_run_precision(cfg.model_cfg, cfg.run_cfg)
    cfg.pretty_print(lambda text, *args: print(text % args))
    # Open what training opens at its start, so that errors come up here.
    _build_data(cfg)
    if run.resume_ckpt_path not in (None, "", AUTO) and cached_path(run.resume_ckpt_path).is_file():
        load_checkpoint(run.resume_ckpt_path, "run.resume_ckpt_path")
    # The parts of the model, with their precision and size, without loading weights.
    device = run_device(run) if gpu_memory_gib is None else torch.device("cuda", 0)
    available = total_memory_bytes(device) if gpu_memory_gib is None else gpu_memory_gib * 2**30
    num_ranks = num_gpus or launched_processes(run).world_size
    shares = num_shares(cfg, num_ranks)
    parts = registry.get_model_class(model_cfg.arch).plan(model_cfg, device, **_sharded(shares))
    print(f"\n{parts_table([part._replace(device=str(device)) for part in parts])}")
    if run.evaluate:
        return 0
    # What would be trained, with which learning rates, for how long, and where the output goes.
    if "train" in model_cfg:
        print(f"\n{mode_table(modes(model_cfg), parts, rates(run))}\n")
    steps = f"{run.iters_per_epoch} steps" if run.iters_per_epoch else "one pass over the data"
    print(
        f"training: {sum(part.trainable for part in parts):,} parameters, {run.max_epoch} epochs of {steps}, "
        f"{num_ranks} process(es) x {max(_batch_sizes(cfg).values())} samples a step; "
        f"output below {expand_path(run.output_dir)}"
    )
    if run.valid_splits:
        every = f"every {run.eval_every_iters} steps and " if run.eval_every_iters else ""
        controls = ", with blank and with wrong images, too" if run.eval_controls else ""
        print(
            f"validation: {every}at the end of each epoch, on {', '.join(run.valid_splits)}{controls}; "
            f"{run.best_metric or best_metrics(run)[0]} decides about {BEST}"
        )
    return _print_memory(cfg, device, available, sum(part.bytes for part in parts), num_ranks)


def _sharded(num_shares: int) -> dict[str, int]:
    """Return `num_shares` as a keyword argument, only if above 1: not every model class takes it."""
    return {"num_shares": num_shares} if num_shares > 1 else {}


def _build_data(cfg: Config) -> None:
    """Build datasets and loaders as training does; starts no worker."""
    task, run = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg), cfg.run_cfg
    datasets = task.build_datasets(cfg)
    task.build_eval_loaders(datasets, run, [*run.valid_splits, *run.test_splits])
    if not run.evaluate:
        task.build_train_loader(datasets, run)


def _print_memory(
    cfg: Config, device: torch.device, available: float, weights: int, num_ranks: int
) -> int:
    """Print the memory that a step needs and the device has; return 0 if it fits, else print what helps and return 1."""
    cuda_context = OUTSIDE if device.type == "cuda" else 0
    limit, needed = available - cuda_context, _needed(cfg, device, num_ranks)
    reserve = f"; {size_text(cuda_context)} for CUDA itself, assumed" if cuda_context else ""
    is_sharded = cfg.run_cfg.shard_llm and num_ranks > 1
    sharing = f", the LLM divided among {num_ranks} processes" if is_sharded else ""
    print(
        f"memory: {size_text(weights)} of weights{sharing}, at most {size_text(needed)} in a step of texts of "
        f"model.max_txt_len={cfg.model_cfg.max_txt_len} tokens, counted{reserve}; "
        f"{device} has {size_text(available)}"
    )
    if needed <= limit:
        return 0
    print("That does not fit. What a step would hold with other settings:")
    for settings in _memory_savers(cfg, device, limit, num_ranks):
        needed = _needed(cfg, device, num_ranks, **settings)
        verdict = "fits" if needed <= limit else "does not fit"
        options = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"  {size_text(needed):>9}  {verdict:<12}  --options {options}")
    return 1


def _needed(cfg: Config, device: torch.device, num_ranks: int = 1, **options: Any) -> int:
    """Return the peak memory in bytes of a step in one of `num_ranks` processes, with `options` over the settings."""
    run, model = cfg.run_cfg, in_run_precision(cfg.model_cfg, cfg.run_cfg)  # a copy
    for key, value in options.items():
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
    batch_size = max(options.get(key, size) for key, size in _batch_sizes(cfg).items())
    count = registry.get_model_class(model.arch).training_memory
    shares = num_ranks if options.get("run.shard_llm", run.shard_llm) else 1
    return count(model, device, batch_size, run.max_tokens_per_batch, **_sharded(shares))


def _memory_savers(
    cfg: Config, device: torch.device, limit: float, num_ranks: int
) -> Iterator[dict[str, Any]]:
    """Yield settings that save memory: each alone, then the largest batch that fits, then all together."""
    run, model_cfg = cfg.run_cfg, cfg.model_cfg
    settings = []
    if not model_cfg.llm_checkpointing:
        settings.append({"model.llm_checkpointing": True})
    if model_cfg.llm_quantization == "none" and not model_cfg.low_resource:
        kinds = ("int8", "nf4") if device.type == "cuda" else ("int8",)
        settings += [{"model.llm_quantization": kind} for kind in kinds]
    can_shard = registry.get_model_class(model_cfg.arch).refusal_to_shard(model_cfg) is None
    if num_ranks > 1 and not run.shard_llm and can_shard:
        yield {"run.shard_llm": True}
    yield from settings
    sizes = _batch_sizes(cfg)
    batch_size = max(sizes.values())
    while batch_size > 1:
        batch_size = -(-batch_size // 2)  # half, rounded up
        options = _smaller(sizes, batch_size, run.accum_grad_iters)
        if batch_size == 1 or _needed(cfg, device, num_ranks, **options) <= limit:
            yield options
            break
    if settings:
        together = functools.reduce(operator.or_, settings)
        yield together
        yield together | _smaller(sizes, 1, run.accum_grad_iters)


def _batch_sizes(cfg: Config) -> dict[str, int]:
    """Return {setting of a batch size: its value} of all settings that the datasets use."""
    common = {"run.batch_size_train": cfg.run_cfg.batch_size_train}
    sizes = {}
    for name, section in cfg.datasets_cfg.items():
        own = section.get("batch_size")
        sizes |= {f"datasets.{name}.batch_size": own} if own else common
    return sizes or common  # no datasets: the calling program has a loader of its own


def _smaller(sizes: dict[str, int], batch_size: int, accum: int) -> dict[str, int]:
    """Return settings for batches of at most `batch_size`, and so much accumulation that an update sees no fewer samples."""
    smaller = {key: batch_size for key, size in sizes.items() if size > batch_size}
    factor = -(-max(sizes.values()) // batch_size)
    return smaller | {"run.accum_grad_iters": accum * factor}


def parts_table(parts: list[Any]) -> str:
    """Return a table of a model's parts (`BaseModel.parts()`) as text."""
    rows = [("part", "parameters", "trainable", "dtype", "device")]
    rows += [
        (part.name, f"{part.parameters:,}", f"{part.trainable:,}", part.dtype, part.device)
        for part in parts
    ]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = f"{{:<{sizes[0]}}}  {{:>{sizes[1]}}}  {{:>{sizes[2]}}}  {{:<{sizes[3]}}}  {{}}"
    return "\n".join(line.format(*row) for row in rows)


def size_text(size_bytes: float) -> str:
    """Return a size as text: in GiB, below 1 GiB in MiB."""
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
