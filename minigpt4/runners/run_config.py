"""Every key of the `run` section with its default, and what can be wrong with its values."""

import math
import os
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
_FROM_ZERO = "num_workers seed warmup_steps init_lr min_lr weight_decay max_grad_norm beta2 max_bad_fraction "
_FROM_ZERO += "eval_samples shard_cache_gb"
_AT_LEAST = dict.fromkeys(_FROM_ONE.split(), 1) | dict.fromkeys(_FROM_ZERO.split(), 0)
_AT_LEAST["keep_last_k"] = 2  # the newest may turn out to be damaged
_AT_MOST = {"max_bad_fraction": 1, "beta2": 1}
_CHOICES = {
    "amp_dtype": tuple(AMP_DTYPES),
    "accum_reduction": ("tokens", "mean", "sum"),
    "warmup_clock": WARMUP_CLOCKS,
    "resume_mode": ("exact", "restart"),
}


@dataclass
class PartRates:
    """Peak learning rates of the model's parts; None: `init_lr`. The schedule scales all of them alike."""

    vision: float | None = None
    bridge: float | None = None
    projector: float | None = None
    llm: float | None = None


@dataclass
class RunConfig:
    """The `run` section. None: no default; needed by training or where the comment says so."""

    task: str = "image_text_pretrain"
    runner: str = "runner_base"
    # optimisation
    lr_sched: str | None = None
    init_lr: float | None = None
    min_lr: float | None = None
    # of parts that have their own; what trains: model.train
    lr: PartRates = field(default_factory=PartRates)
    warmup_lr: float = -1.0  # below 0: init_lr
    warmup_steps: int = 0
    warmup_clock: str = "epoch"  # epoch: as 2023 | global: see common/optims.py
    lr_decay_rate: float | None = None  # needed by linear_warmup_step_lr
    weight_decay: float | None = None
    beta2: float = 0.999
    accum_grad_iters: int = 1
    accum_reduction: str = (
        "tokens"  # of the batches and ranks of an update | mean, sum (as 2023): see runners/loop.py
    )
    max_grad_norm: float | None = None  # None: no clipping
    max_skipped_updates: int = 5  # in a row, for numbers that are not finite; then the run ends
    amp: bool = False
    amp_dtype: str = "auto"  # auto (float16 on CUDA) | float16 | bfloat16
    # length
    max_epoch: int | None = None
    iters_per_epoch: int | None = None  # None: one pass over map-style data
    # data
    batch_size_train: int | None = None  # per process
    max_tokens_per_batch: int | None = None  # in the LLM at once: larger batches go in parts
    batch_size_eval: int | None = None  # needed by valid_splits and test_splits
    num_workers: int | None = None  # per dataset and process
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    max_bad_fraction: float = 0.05
    shard_cache: str | None = (
        None  # folder that keeps shards read from addresses, shared by the ranks of a machine
    )
    shard_cache_gb: float = 50  # its bound, in 10^9 bytes
    # validation, of valid_splits: at the end of each epoch, and
    eval_every_iters: int | None = None  # .. after so many steps of it
    eval_controls: bool = (
        True  # also the loss with blank and with wrong images: three forward passes for one
    )
    eval_samples: int = 4  # held-out samples whose greedy answers samples.html shows
    best_metric: str | None = (
        None  # of checkpoint_best.pth: <split>_loss (default: the first split's), <split>_wrong_gap
    )
    # run
    seed: int = 42
    output_dir: str | None = None
    save_every_iters: int | None = None  # also save after so many steps of an epoch
    keep_last_k: int = 2  # of those; the ones at the end of an epoch are all kept
    resume_ckpt_path: str | None = None  # path, URL, or auto: the newest below output_dir, if any
    resume_mode: str = (
        "exact"  # exact: no other settings | restart: weights and schedule, data anew
    )
    evaluate: bool = False
    log_freq: int = 50
    report_to: Any = None  # trackers: wandb, tensorboard, trackio, mlflow; one name or a list
    tensorboard: bool = False  # the same as tensorboard in report_to
    # machine
    device: str = "auto"
    read_ahead: bool = True  # weight files go to memory while libraries load; not if they fill it
    shard_llm: bool = (
        False  # each rank holds a share of the frozen LLM, for one that is larger than a card
    )
    distributed: bool = True  # False: refuse to be one of several processes
    dist_url: str = "env://"
    dist_timeout_s: int = 1800  # of the process group
    step_timeout_s: int = 300  # how long a rank may keep the others waiting, or data a rank
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
    """Return all that is wrong with a `run` section, whose key is `where`; nothing is loaded."""
    problems = launch_problems(cfg, where)

    def check(is_wrong: bool, key: str, message: str) -> None:
        if is_wrong:
            problems.append(Problem(f"{where}.{key}", message))

    # each key for itself
    for key in (_FOR_EVALUATION if cfg.evaluate else _FOR_TRAINING).split():
        check(cfg[key] in (None, ""), key, "missing; it has no default")
    for key, least in _AT_LEAST.items():
        value, most = cfg[key], _AT_MOST.get(key, math.inf)
        limit = f"between {least} and {most}" if key in _AT_MOST else f"at least {least}"
        is_wrong = value is not None and not least <= value <= most
        check(is_wrong, key, f"{value} is out of range; it must be {limit}")
    for part, rate in (cfg.lr or {}).items():
        check(
            rate is not None and not rate > 0,
            f"lr.{part}",
            f"{rate} is out of range; it must be above 0",
        )
        lacks_unit = rate is not None and cfg.init_lr == 0
        check(
            lacks_unit, "init_lr", f"0, and {where}.lr.{part} is a multiple of it; set it above 0"
        )
    for key, choices in _CHOICES.items():
        check(cfg[key] not in choices, key, f"'{cfg[key]}' is not one of {', '.join(choices)}")

    # keys that need each other
    splits = [*cfg.valid_splits, *cfg.test_splits]
    lacks_size, lacks_train = cfg.batch_size_eval is None, "train" not in cfg.train_splits
    check(
        bool(splits) and lacks_size,
        "batch_size_eval",
        f"missing; the splits {', '.join(splits)} need it",
    )
    message = f"True, but {where}.valid_splits and {where}.test_splits are empty; name one"
    check(cfg.evaluate and not splits, "evaluate", message)
    check(
        cfg.eval_every_iters and not cfg.valid_splits,
        "eval_every_iters",
        f"{where}.valid_splits is empty; name one",
    )
    known = best_metrics(cfg)
    advice = f"known: {', '.join(known)}" if known else f"{where}.valid_splits is empty; name one"
    check(
        cfg.best_metric not in (None, *known),
        "best_metric",
        f"'{cfg.best_metric}' is not measured; {advice}",
    )
    lacks_rate = cfg.lr_sched == "linear_warmup_step_lr" and cfg.lr_decay_rate is None
    check(lacks_rate, "lr_decay_rate", "missing; linear_warmup_step_lr needs it")
    message = f"{list(cfg.train_splits)} has no 'train', the split that is trained on"
    check(lacks_train and not cfg.evaluate, "train_splits", message)

    # the machine
    try:
        device = resolve_device(cfg.device, launched_processes(cfg).local_rank, f"{where}.device")
        is_wrong = cfg.amp and cfg.amp_dtype == "float16" and device.type != "cuda"
        check(
            is_wrong, "amp_dtype", f"float16 trains on CUDA only, the device is {device}; use auto"
        )
    except DeviceError as error:
        problems.append(error.problem)
    except ValueError:  # the launch, of which launch_problems has told
        pass
    for key in ("output_dir", "shard_cache"):
        if cfg[key] and (problem := folder_problem(cfg[key])):
            problems.append(Problem(f"{where}.{key}", problem))
    problems += find_tracker_problems(cfg, where)
    if cfg.resume_ckpt_path and cfg.resume_ckpt_path != AUTO:
        problems += filter(
            None, [weights_problem(cfg.resume_ckpt_path, f"{where}.resume_ckpt_path")]
        )
    return problems


def best_metrics(cfg: RunConfig) -> list[str]:
    """Return what `best_metric` may be; the first one is the default.

    <split>_loss: the lower, the better. <split>_wrong_gap: how much higher the loss with wrong images is; the higher.
    """
    controls = [f"{split}_wrong_gap" for split in cfg.valid_splits] if cfg.eval_controls else []
    return [*(f"{split}_loss" for split in cfg.valid_splits), *controls]


def folder_problem(path: str) -> str | None:
    """Return why no folder can be made below `path`, or nothing; nothing is made."""
    there = expand_path(path).absolute()
    while True:
        try:
            os.lstat(there)
            break
        except (FileNotFoundError, NotADirectoryError):
            there = there.parent
        except (OSError, ValueError) as error:  # a name that is too long, a null byte
            return f"{path!r} is no name of a folder ({error})"
    if not there.is_dir():
        return f"'{there}' is no folder; give one, which is made if it is not there"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"'{there}' is not writable for user {os.getuid()}; choose another place"
    return None
