"""What a run would train, from its configuration alone: `train.py --dry-run`."""

from minigpt4.common.device import resolve_device, set_precision, total_memory_bytes
from minigpt4.common.dist_utils import launched_processes
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path


def print_plan(cfg):
    """Print the checked configuration and what it would train: parts, precision, memory, length. Return 0.

    Nothing is loaded: the model is built without weights.
    """
    run = cfg.run_cfg
    cfg.pretty_print(lambda text, *args: print(text % args))
    device = resolve_device(run.device, launched_processes(run)[2])
    set_precision(cfg.model_cfg, run)
    model_class = registry.get_model_class(cfg.model_cfg.arch)
    parts = model_class.plan(cfg.model_cfg, device)
    print(f"\n{parts_table([part._replace(device=str(device)) for part in parts])}")
    weights, trainable = sum(part.bytes for part in parts), sum(part.trainable for part in parts)
    states = trainable * 3 * 4  # float32: gradient and AdamW's two moments
    activations = model_class.activation_bytes(cfg.model_cfg, device, run.batch_size_train or 1)
    print(
        f"memory: {_size(weights)} of weights, {_size(states)} of gradients and optimizer, about "
        f"{_size(activations)} of activations: {_size(weights + states + activations)}; "
        f"{device} has {_size(total_memory_bytes(device))}"
    )
    if weights + states + activations > total_memory_bytes(device):
        print("That does not fit: lower run.batch_size_train and raise run.accum_grad_iters, or model.low_resource")
    if not run.evaluate:
        steps = f"{run.iters_per_epoch} steps" if run.iters_per_epoch else "one pass over the data"
        print(
            f"training: {trainable:,} parameters, {run.max_epoch} epochs of {steps}, "
            f"{launched_processes(run)[1]} process(es) x {run.batch_size_train} samples a step; "
            f"output below {expand_path(run.output_dir)}"
        )
    return 0


def parts_table(parts):
    """Return a table of a model's parts (`BaseModel.parts()`) as text."""
    rows = [("part", "parameters", "trainable", "dtype", "device")]
    rows += [(part.name, f"{part.parameters:,}", f"{part.trainable:,}", part.dtype, part.device) for part in parts]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )


def _size(size_bytes):
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
