"""The `run` section: every key with its default, and the checks of their values."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.config import Problem
from minigpt4.common.device import AMP_DTYPES, DeviceError, resolve_device
from minigpt4.common.launchers import launch_problems, launched_processes
from minigpt4.common.optims import WARMUP_CLOCKS
from minigpt4.common.utils import expand_path, weights_problem
from minigpt4.runners.run_folder import AUTO
from minigpt4.runners.trackers import find_tracker_problems

_FOR_TRAINING = (
    "lr_sched init_lr min_lr weight_decay max_epoch batch_size_train num_workers output_dir"
)
_FOR_EVALUATION = "num_workers output_dir"
_FROM_ONE = "max_epoch iters_per_epoch batch_size_train batch_size_eval accum_grad_iters log_freq dist_timeout_s "
_FROM_ONE += "world_size save_every_iters step_timeout_s max_skipped_updates max_tokens_per_batch eval_every_iters"
_FROM_ZERO = "num_workers seed warmup_steps init_lr min_lr weight_decay max_bad_fraction "
_FROM_ZERO += "eval_samples shard_cache_gb"
_AT_LEAST = dict.fromkeys(_FROM_ONE.split(), 1) | dict.fromkeys(_FROM_ZERO.split(), 0)
_AT_LEAST["keep_last_k"] = 2  # in case the newest is damaged
_AT_MOST = {"max_bad_fraction": 1}
_OTHER_RANGES = {  # key: (whether a value is in it, the range in words)
    "beta2": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "max_grad_norm": (lambda value: value > 0, "above 0; null: no clipping"),
    "lr_decay_rate": (lambda value: value > 0, "above 0"),
}
_CHOICES = {
    "amp_dtype": tuple(AMP_DTYPES),
    "accum_reduction": ("tokens", "mean", "sum"),
    "warmup_clock": WARMUP_CLOCKS,
    "resume_mode": ("exact", "restart"),
}


@dataclass
class PartRates:
    """Peak learning rates of the model's parts; None: `init_lr`. The schedule scales all of them by the same factor."""

    vision: float | None = None
    bridge: float | None = None
    projector: float | None = None
    llm: float | None = None


@dataclass
class RunConfig:
    """The `run` section. Of the keys that are None here, training needs those of `_FOR_TRAINING`; see also the comments."""

    task: str = "image_text_pretrain"
    runner: str = "runner_base"
    # optimisation
    lr_sched: str | None = None
    init_lr: float | None = None
    min_lr: float | None = None
    # of parts with a rate of their own; `model.train` says which parts train
    lr: PartRates = field(default_factory=PartRates)
    warmup_lr: float = -1.0  # below 0: init_lr
    warmup_steps: int = 0
    warmup_clock: str = "epoch"  # epoch (as in 2023) | global: see common/optims.py
    lr_decay_rate: float | None = None  # needed by linear_warmup_step_lr
    weight_decay: float | None = None
    beta2: float = 0.999
    accum_grad_iters: int = 1
    # over the batches and ranks of an update: tokens | mean | sum (as in 2023), see runners/loop.py
    accum_reduction: str = "tokens"
    max_grad_norm: float | None = None  # None: no clipping
    max_skipped_updates: int = 5  # non-finite ones in a row, which end the run
    amp: bool = False
    amp_dtype: str = "auto"  # auto (float16 on CUDA) | float16 | bfloat16
    # length
    max_epoch: int | None = None
    iters_per_epoch: int | None = None  # None: one pass over map-style data
    # data
    batch_size_train: int | None = None  # per process
    max_tokens_per_batch: int | None = None  # in the LLM at once: larger batches run in parts
    batch_size_eval: int | None = None  # needed by valid_splits and test_splits
    num_workers: int | None = None  # per dataset and process
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    max_bad_fraction: float = 0.05
    # folder that caches shards read from URLs, shared by the ranks of a machine
    shard_cache: str | None = None
    shard_cache_gb: float = 50  # limit of the cache, in 10^9 bytes
    # validation on valid_splits, at the end of each epoch
    eval_every_iters: int | None = None  # and after every so many steps of an epoch
    # also measure the loss with blank and with wrong images: three forward passes instead of one
    eval_controls: bool = True
    eval_samples: int = 4  # held-out samples whose greedy answers samples.html shows
    # of checkpoint_best.pth: <split>_loss (default: the first split's) or <split>_wrong_gap
    best_metric: str | None = None
    # run
    seed: int = 42
    output_dir: str | None = None
    save_every_iters: int | None = None  # also save after every so many steps of an epoch
    keep_last_k: int = 2  # of these; the checkpoints at the end of an epoch are all kept
    resume_ckpt_path: str | None = None  # path, URL, or auto: the newest below output_dir, if any
    # exact: with the same settings | restart: weights, optimizer, schedule; the data starts anew
    resume_mode: str = "exact"
    evaluate: bool = False
    log_freq: int = 50
    report_to: Any = None  # trackers: wandb, tensorboard, trackio, mlflow; one name or a list
    tensorboard: bool = False  # the same as tensorboard in report_to
    # machine
    device: str = "auto"
    # read weight files into the page cache while libraries load; turn it off if they fill the RAM
    read_ahead: bool = True
    # each rank holds a shard of the frozen LLM, for an LLM larger than one GPU
    shard_llm: bool = False
    distributed: bool = True  # False: refuse to be one of several processes
    dist_url: str = "env://"
    dist_timeout_s: int = 1800  # of the process group
    step_timeout_s: int = 300  # how long a rank may wait for another rank or for a batch
    world_size: int = 1  # above 1: takes precedence over SLURM's number of tasks

    WRITTEN_PATHS = ("output_dir", "resume_ckpt_path", "shard_cache")
    DEAD_KEYS = {  # not annotated: a table of the class, not a key of the section
        "use_dist_eval_sampler": "evaluation is always divided among the ranks",
        "train_dataset_ratios": "set datasets.<name>.sample_ratio",
        "max_iters": "set run.max_epoch and run.iters_per_epoch",
        "iters_per_inner_epoch": "set run.iters_per_epoch",
        "wandb_log": "set run.report_to: wandb",
        "job_name": "the run's folder names it",
        "name": "evaluate.py --output names the folder of the results",
        "save_path": "evaluate.py --output names the folder of the results",
        "rank": "the launcher says it; code asks minigpt4.common.dist_utils.get_rank()",
        "gpu": "the launcher says it; code asks minigpt4.common.launchers.launched_processes(run_cfg).local_rank",
        "dist_backend": "it is nccl on CUDA, else gloo",
    }


def find_problems(cfg: RunConfig, where: str) -> list[Problem]:
    """Return everything that is wrong with a `run` section, whose key is `where`; nothing is loaded."""
    found = [*_value_problems(cfg, where), *_combination_problems(cfg, where)]
    problems = [Problem(f"{where}.{key}", message) for key, message in found]
    return [*launch_problems(cfg, where), *problems, *_machine_problems(cfg, where)]


def _value_problems(cfg: RunConfig, where: str) -> Iterator[tuple[str, str]]:
    """Yield (key, message) of each single value that is missing, out of range or not a known choice."""
    for key in (_FOR_EVALUATION if cfg.evaluate else _FOR_TRAINING).split():
        if cfg[key] in (None, ""):
            yield key, "missing; it has no default"
    for key, least in _AT_LEAST.items():
        value, most = cfg[key], _AT_MOST.get(key, math.inf)
        if value is not None and not least <= value <= most:
            limit = f"between {least} and {most}" if key in _AT_MOST else f"at least {least}"
            yield key, f"{value} is out of range; it must be {limit}"
    for key, (is_inside, limit) in _OTHER_RANGES.items():
        if cfg[key] is not None and not is_inside(cfg[key]):
            yield key, f"{cfg[key]} is out of range; it must be {limit}"
    rates = {part: rate for part, rate in (cfg.lr or {}).items() if rate is not None}
    for part, rate in rates.items():
        if not rate > 0:
            yield f"lr.{part}", f"{rate} is out of range; it must be above 0"
        if cfg.init_lr == 0:
            yield "init_lr", f"0, and {where}.lr.{part} is a multiple of it; set it above 0"
    for key, choices in _CHOICES.items():
        if cfg[key] not in choices:
            yield key, f"'{cfg[key]}' is not one of {', '.join(choices)}"


def _combination_problems(cfg: RunConfig, where: str) -> Iterator[tuple[str, str]]:
    """Yield (key, message) of keys that do not fit together."""
    splits = [*cfg.valid_splits, *cfg.test_splits]
    if splits and cfg.batch_size_eval is None:
        yield "batch_size_eval", f"missing; the splits {', '.join(splits)} need it"
    if cfg.evaluate and not splits:
        message = f"True, but {where}.valid_splits and {where}.test_splits are empty; name one"
        yield "evaluate", message
    no_valid_split = f"{where}.valid_splits is empty; name one"
    if cfg.eval_every_iters and not cfg.valid_splits:
        yield "eval_every_iters", no_valid_split
    known = best_metrics(cfg)
    if cfg.best_metric not in (None, *known):
        advice = f"known: {', '.join(known)}" if known else no_valid_split
        yield "best_metric", f"'{cfg.best_metric}' is not measured; {advice}"
    if cfg.lr_sched == "linear_warmup_step_lr" and cfg.lr_decay_rate is None:
        yield "lr_decay_rate", "missing; linear_warmup_step_lr needs it"
    if "train" not in cfg.train_splits and not cfg.evaluate:
        message = f"{list(cfg.train_splits)} has no 'train', the split that is trained on"
        yield "train_splits", message


def _machine_problems(cfg: RunConfig, where: str) -> Iterator[Problem]:
    """Yield the problems with what this machine has: devices, folders, trackers, the checkpoint."""
    try:
        device = resolve_device(cfg.device, launched_processes(cfg).local_rank, f"{where}.device")
        if cfg.amp and cfg.amp_dtype == "float16" and device.type != "cuda":
            message = (
                f"{device}, but {where}.amp_dtype=float16 trains on CUDA only; set that to auto"
            )
            yield Problem(f"{where}.device", message)
    except DeviceError as error:
        yield error.problem
    except ValueError:  # of the launch: launch_problems reports it
        pass
    for key in ("output_dir", "shard_cache"):
        if cfg[key] and (problem := folder_problem(cfg[key])):
            yield Problem(f"{where}.{key}", problem)
    yield from find_tracker_problems(cfg, where)
    if cfg.resume_ckpt_path and cfg.resume_ckpt_path != AUTO:
        problem = weights_problem(cfg.resume_ckpt_path, f"{where}.resume_ckpt_path")
        yield from [problem] if problem else []


def best_metrics(cfg: RunConfig) -> list[str]:
    """Return what `best_metric` may be; the first one is the default.

    <split>_loss: lower is better. <split>_wrong_gap: how much higher the loss with wrong images is; higher is better.
    """
    controls = [f"{split}_wrong_gap" for split in cfg.valid_splits] if cfg.eval_controls else []
    return [*(f"{split}_loss" for split in cfg.valid_splits), *controls]


def folder_problem(path: str) -> str | None:
    """Return why no folder can be made at `path`, None if one can; makes nothing."""
    existing = expand_path(path).absolute()
    while True:
        try:
            os.lstat(existing)
            break
        except (FileNotFoundError, NotADirectoryError):
            existing = existing.parent
        except (OSError, ValueError) as error:  # a name that is too long, a null byte
            return f"{path!r} is no name of a folder ({error})"
    if not existing.is_dir():
        return f"'{existing}' is no folder; give one, which is made if it is not there"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"'{existing}' is not writable for user {os.getuid()}; choose another place"
    return None
