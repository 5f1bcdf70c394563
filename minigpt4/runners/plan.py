"""What `train.py --dry-run` says: configuration, parts, memory of a step, and what helps where it does not fit."""

import copy

import torch

from minigpt4.common import dist_utils
from minigpt4.common.device import resolve_device, set_precision, total_memory_bytes
from minigpt4.common.memory import OUTSIDE
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path


def print_plan(cfg, gpu_memory_gib=None):
    """Print the checked configuration and what it would train: parts, precision, memory, length.

    Nothing is loaded: the model is built without weights. `gpu_memory_gib`: plan for a GPU of that size, here or not.
    Return 0, or 1 if a training step does not fit.
    """
    run = cfg.run_cfg
    cfg.pretty_print(lambda text, *args: print(text % args))
    here = resolve_device(run.device, dist_utils.launched_processes(run)[2]) if gpu_memory_gib is None else None
    device = here or torch.device("cuda", 0)
    available = total_memory_bytes(device) if gpu_memory_gib is None else gpu_memory_gib * 2**30
    set_precision(cfg.model_cfg, run)
    parts = registry.get_model_class(cfg.model_cfg.arch).plan(cfg.model_cfg, device)
    print(f"\n{parts_table([part._replace(device=str(device)) for part in parts])}")
    if run.evaluate:
        return 0
    steps = f"{run.iters_per_epoch} steps" if run.iters_per_epoch else "one pass over the data"
    print(
        f"training: {sum(part.trainable for part in parts):,} parameters, {run.max_epoch} epochs of {steps}, "
        f"{dist_utils.launched_processes(run)[1]} process(es) x {run.batch_size_train} samples a step; "
        f"output below {expand_path(run.output_dir)}"
    )
    return _print_memory(cfg, device, available, sum(part.bytes for part in parts))


def _print_memory(cfg, device, available, weights):
    """Print what a step holds beside what the device has; return 0 if it fits, else print what helps and return 1."""
    outside = OUTSIDE if device.type == "cuda" else 0
    needed = _needed(cfg, device)
    beside = f"; {size_text(outside)} for CUDA itself, assumed" if outside else ""
    print(
        f"memory: {size_text(weights)} of weights, at most {size_text(needed)} in a step of texts of model.max_txt_len="
        f"{cfg.model_cfg.max_txt_len} tokens, counted{beside}; "
        f"{device} has {size_text(available)}"
    )
    if needed + outside <= available:
        return 0
    print("That does not fit. What a step would hold with other settings:")
    for options in _remedies(cfg, device, available - outside):
        needed = _needed(cfg, device, **options)
        verdict = "fits" if needed + outside <= available else "does not fit"
        print(f"  {size_text(needed):>9}  {verdict:<12}  --options {' '.join(f'{k}={v}' for k, v in options.items())}")
    return 1


def _needed(cfg, device, **options):
    """Return the most bytes that a step holds with some settings changed."""
    model = copy.deepcopy(cfg.model_cfg)
    for key, value in options.items():
        if key.startswith("model."):
            model[key.removeprefix("model.")] = value
    run = cfg.run_cfg
    batch_size, max_tokens = options.get("run.batch_size_train", run.batch_size_train), run.max_tokens_per_batch
    return registry.get_model_class(model.arch).training_memory(model, device, batch_size, max_tokens)


def _remedies(cfg, device, limit):
    """Yield settings that save memory: each for itself, the largest batch that fits, at last all together."""
    kinds = ["int8", "nf4"] if device.type == "cuda" else ["int8"]
    single = [{"model.llm_checkpointing": True}] * (not cfg.model_cfg.llm_checkpointing)
    if cfg.model_cfg.llm_quantization == "none" and not cfg.model_cfg.low_resource:
        single += [{"model.llm_quantization": kind} for kind in kinds]
    yield from single
    run, kind = cfg.run_cfg, {key: value for option in single for key, value in option.items()}
    batch_size = run.batch_size_train
    while batch_size > 1:
        batch_size = -(-batch_size // 2)
        options = _smaller(run, batch_size)
        if batch_size == 1 or _needed(cfg, device, **options) <= limit:
            yield options
            break
    if kind:
        yield kind
        yield kind | _smaller(run, 1)


def _smaller(run, batch_size):
    """Return the settings of a smaller batch, with as many samples to an optimizer step as before, or a few more."""
    accum = run.accum_grad_iters * -(-run.batch_size_train // batch_size)
    return {"run.batch_size_train": batch_size, "run.accum_grad_iters": accum}


def parts_table(parts):
    """Return a table of a model's parts (`BaseModel.parts()`) as text."""
    rows = [("part", "parameters", "trainable", "dtype", "device")]
    rows += [(part.name, f"{part.parameters:,}", f"{part.trainable:,}", part.dtype, part.device) for part in parts]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )


def size_text(size_bytes):
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
