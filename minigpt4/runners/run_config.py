"""Every key of the `run` section with its default, and what can be wrong with a section before anything is built."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass, field

from minigpt4.common.config import Problem
from minigpt4.common.device import AMP_DTYPES, DeviceError, resolve_device
from minigpt4.common.dist_utils import launch_problems, launched_processes
from minigpt4.common.optims import WARMUP_CLOCKS
from minigpt4.common.utils import missing_file
from minigpt4.runners.run_folder import AUTO

ACCUM_REDUCTIONS = ("mean", "sum")
RESUME_MODES = ("exact", "restart")
REQUIRED_FOR_TRAINING = (
    "lr_sched",
    "init_lr",
    "min_lr",
    "weight_decay",
    "max_epoch",
    "batch_size_train",
    "num_workers",
    "output_dir",
)
_AT_LEAST = {
    **dict.fromkeys(("max_epoch", "iters_per_epoch", "batch_size_train", "batch_size_eval", "accum_grad_iters"), 1),
    **dict.fromkeys(("log_freq", "dist_timeout_s", "world_size", "save_every_iters"), 1),
    **dict.fromkeys(("step_timeout_s", "max_skipped_updates", "max_tokens_per_batch"), 1),
    "keep_last_k": 2,  # the newest may turn out to be damaged
    **dict.fromkeys(("num_workers", "seed", "warmup_steps", "init_lr", "min_lr", "weight_decay", "max_grad_norm"), 0),
    **dict.fromkeys(("beta2", "max_bad_fraction"), 0),
}
_AT_MOST = {"max_bad_fraction": 1, "beta2": 1}
_CHOICES = {
    "amp_dtype": tuple(AMP_DTYPES),
    "accum_reduction": ACCUM_REDUCTIONS,
    "warmup_clock": WARMUP_CLOCKS,
    "resume_mode": RESUME_MODES,
}


@dataclass
class RunConfig:
    """The `run` section. None: has no default, and is needed by training or where the comment says so."""

    task: str = "image_text_pretrain"
    runner: str = "runner_base"
    # optimisation
    lr_sched: str | None = None
    init_lr: float | None = None
    min_lr: float | None = None
    warmup_lr: float = -1.0  # below 0: init_lr
    warmup_steps: int = 0
    warmup_clock: str = "epoch"  # epoch: as 2023 | global: see common/optims.py
    lr_decay_rate: float | None = None  # needed by linear_warmup_step_lr
    weight_decay: float | None = None
    beta2: float = 0.999
    accum_grad_iters: int = 1
    accum_reduction: str = "mean"  # of the gradients of one optimizer step; sum: as 2023
    max_grad_norm: float | None = None  # None: no clipping
    max_skipped_updates: int = 5  # in a row, for losses or gradients that are not finite; then the run ends
    amp: bool = False
    amp_dtype: str = "auto"  # auto (float16 on CUDA) | float16 | bfloat16
    # length
    max_epoch: int | None = None
    iters_per_epoch: int | None = None  # None: one pass over map-style data
    # data
    batch_size_train: int | None = None  # per process
    max_tokens_per_batch: int | None = None  # in the LLM at once: a larger batch is computed in parts; None: as it is
    batch_size_eval: int | None = None  # needed by valid_splits and test_splits
    num_workers: int | None = None  # per dataset and process
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=list)
    test_splits: list[str] = field(default_factory=list)
    max_bad_fraction: float = 0.05
    # run
    seed: int = 42
    output_dir: str | None = None
    save_every_iters: int | None = None  # a checkpoint within the epoch after so many steps; None: at its end only
    keep_last_k: int = 2  # of those; the ones at the end of an epoch are all kept
    resume_ckpt_path: str | None = None  # path, URL, or auto: the newest checkpoint below output_dir, if there is one
    resume_mode: str = "exact"  # exact: refuse other settings | restart: weights and schedule only, data begins anew
    evaluate: bool = False
    log_freq: int = 50
    tensorboard: bool = False
    # machine
    device: str = "auto"
    read_ahead: bool = True  # weight files go to memory while libraries load; False where they fill the memory
    distributed: bool = True  # False: refuse to be one of several processes
    dist_url: str = "env://"
    dist_timeout_s: int = 1800  # of the process group
    step_timeout_s: int = 300  # within training: how long a rank may keep the others waiting
    world_size: int = 1  # above 1: takes precedence over SLURM's number of tasks

    DEAD_KEYS = {  # not annotated: a table of the class, not a key of the section
        "use_dist_eval_sampler": "evaluation is always divided among the ranks",
        "train_dataset_ratios": "set datasets.<name>.sample_ratio",
        "max_iters": "set run.max_epoch and run.iters_per_epoch",
        "iters_per_inner_epoch": "set run.iters_per_epoch",
        "rank": "the launcher says it; code asks minigpt4.common.dist_utils.get_rank()",
        "gpu": "the launcher says it; code asks minigpt4.common.dist_utils.launched_processes(run_cfg).local_rank",
        "dist_backend": "it is nccl on CUDA, else gloo",
    }


def find_problems(cfg: RunConfig, where: str) -> list[Problem | str]:
    """Return all that is wrong with a `run` section, whose key is `where`; nothing is loaded."""
    problems = _missing(cfg, where) + _out_of_range(cfg, where) + launch_problems(cfg, where)

    def add(key: str, message: str) -> None:
        problems.append(Problem(f"{where}.{key}", message))

    # the machine
    try:
        device = resolve_device(cfg.device, launched_processes(cfg).local_rank, f"{where}.device")
        if cfg.amp and cfg.amp_dtype == "float16" and device.type != "cuda":
            add("amp_dtype", f"float16 trains on CUDA only, the device is {device}; use auto")
    except DeviceError as error:
        problems.append(error.problem)
    if cfg.tensorboard and importlib.util.find_spec("tensorboard") is None:
        add("tensorboard", "True needs the package tensorboard; pip install tensorboard")

    # keys that need each other, or a file
    if cfg.lr_sched == "linear_warmup_step_lr" and cfg.lr_decay_rate is None:
        add("lr_decay_rate", "missing; linear_warmup_step_lr needs it")
    if "train" not in cfg.train_splits and not cfg.evaluate:
        add("train_splits", f"{list(cfg.train_splits)} has no 'train', the split that is trained on")
    if cfg.resume_ckpt_path and cfg.resume_ckpt_path != AUTO:
        problems += filter(None, [missing_file(cfg.resume_ckpt_path, f"{where}.resume_ckpt_path")])
    return problems


def _missing(cfg: RunConfig, where: str) -> list[Problem]:
    evaluated = [*cfg.valid_splits, *cfg.test_splits]
    problems = []
    for key in ("output_dir", "num_workers") if cfg.evaluate else REQUIRED_FOR_TRAINING:
        if cfg[key] is None:
            problems.append(Problem(f"{where}.{key}", "missing; it has no default"))
    if evaluated and cfg.batch_size_eval is None:
        message = f"missing; the splits {', '.join(evaluated)} need it"
        problems.append(Problem(f"{where}.batch_size_eval", message))
    if cfg.evaluate and not evaluated:
        message = f"True, but {where}.valid_splits and {where}.test_splits are empty; name one"
        problems.append(Problem(f"{where}.evaluate", message))
    return problems


def _out_of_range(cfg: RunConfig, where: str) -> list[Problem]:
    problems = []
    for entry in dataclasses.fields(RunConfig):
        key, value = entry.name, cfg[entry.name]
        if value is None:
            continue
        least, most = _AT_LEAST.get(key, -math.inf), _AT_MOST.get(key, math.inf)
        if key in _AT_LEAST and not least <= value <= most:
            limit = f"between {least} and {most}" if key in _AT_MOST else f"at least {least}"
            message = f"{value} is out of range; it must be {limit}"
            problems.append(Problem(f"{where}.{key}", message))
        if key in _CHOICES and value not in _CHOICES[key]:
            message = f"'{value}' is not one of {', '.join(_CHOICES[key])}"
            problems.append(Problem(f"{where}.{key}", message))
    return problems
