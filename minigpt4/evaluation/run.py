"""From the names of benchmarks to results: what `evaluate.py --tasks` calls.

add_benchmark_arguments(parser)                                       --tasks, --control, --compare
evaluate_benchmarks(Config(args), args.tasks, output, args.device, args.control)
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.utils import cached_path, file_sha256
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.controls import CONTROLS, with_control
from minigpt4.evaluation.results import Run, summary, write_results
from minigpt4.evaluation.shared_answers import SharedAnswers

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat, Conversation

# what answers items, in any order: {"id", "answer"} or {"id", "error"} each; cfg has batch_size and max_new_tokens
Answer = Callable[[Sequence[BenchmarkItem], BenchmarkConfig], Iterable[dict]]


class OpenBenchmark(NamedTuple):
    """A benchmark whose files were read and are in order."""

    benchmark: Benchmark
    items: list[BenchmarkItem]


@dataclass
class Asked:
    """How the benchmarks are asked. `settings`: what answers depend on beside the benchmark, such as weights.

    Answers of other settings are never mixed. `details` go into the results as they are.
    """

    control: str = ""  # one of controls.CONTROLS
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def add_benchmark_arguments(parser: ArgumentParser) -> None:
    """Give evaluate.py its options for benchmarks."""
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="benchmarks, sections of evaluation_datasets"
    )
    parser.add_argument(
        "--control",
        choices=CONTROLS,
        default="",
        help="ask with grey images, or those of other items",
    )
    parser.add_argument(
        "--compare", nargs=2, metavar="JSON", help="compare two results.json; no model is needed"
    )


def evaluate_benchmarks(
    cfg: Config, names: Iterable[str], output: Path, device: str | None = None, control: str = ""
) -> dict[str, Path]:
    """Answer the benchmarks of `evaluation_datasets` greedily with the model of `cfg`; return the results' paths.

    Everything that is known from files is checked before the model is loaded; it is loaded only if something is left
    to answer. Each rank of torchrun takes its share. Raises ConfigError, and ValueError or OSError as `run_benchmarks`.
    """
    from minigpt4 import load_config
    from minigpt4.common.dist_utils import from_main, init_distributed_mode, leave_process_group
    from minigpt4.common.launchers import launched_processes
    from minigpt4.conversation.chat import check_question
    from minigpt4.evaluation.answer_file import settings_of
    from minigpt4.evaluation.answering import answers

    # all that can be refused is refused before the model is loaded
    benchmarks = open_benchmarks(cfg, names)
    for name, (_, items) in benchmarks.items():
        with_control(items, control)
        for item in items:
            try:
                check_question(item.question)
            except ValueError as error:
                raise ValueError(
                    f"evaluation_datasets.{name}: item '{item.id}': {error}"
                ) from error
    if launched_processes(cfg.run_cfg).world_size > 1:
        init_distributed_mode(cfg.run_cfg)

    @cache
    def model() -> tuple[Chat, Conversation]:
        return load_config(cfg, device)

    def answer(items: Sequence[BenchmarkItem], section: BenchmarkConfig) -> Iterator[dict]:
        sampling = {key: getattr(section, key) for key in ("temperature", "seed", "max_new_tokens")}
        return answers(
            *model(), items, batch_size=section.batch_size, ranking=section.ranking, **sampling
        )

    # the checkpoint whole, the frozen weights by a sample of their bytes
    ckpt = cached_path(cfg.model_cfg.ckpt) if cfg.model_cfg.get("ckpt") else None
    settings = from_main(lambda: settings_of(cfg, temperature=0.0))
    weights = from_main(lambda: {ckpt.name: file_sha256(ckpt)} if ckpt and ckpt.is_file() else {})
    details = {"weights": weights, "model": settings, "config": cfg.to_dict()}
    try:
        paths = run_benchmarks(benchmarks, output, answer, Asked(control, settings, details))
    except BaseException:
        leave_process_group(after_error=True)
        raise
    leave_process_group()
    return paths


def open_benchmarks(cfg: Config, names: Iterable[str]) -> dict[str, OpenBenchmark]:
    """Return the benchmarks of the sections `evaluation_datasets.<name>` by name; no model is needed.

    Raises ConfigError with all that is wrong with any of them: names, keys, files, images.
    """
    opened = {}
    for name in dict.fromkeys(names):
        where = f"evaluation_datasets.{name}"
        section = cfg.benchmark_cfg(name)
        if section is None or not cfg.report.is_clean(where):
            continue
        benchmark = make_benchmark(section.benchmark, {key: section[key] for key in section})
        try:
            benchmark.prompt()
            opened[name] = OpenBenchmark(benchmark, benchmark.checked_items())
        except (ValueError, OSError) as error:
            cfg.report.add_found([f"{where}: {error}"], where)
    if cfg.report.problems:
        raise ConfigError(cfg.report.problems)
    return opened


def make_benchmark(registered: str, settings: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark of a registered name; `settings` are the fields of its Config. Raises RegistryError."""
    cls = registry.get_benchmark_class(registered)
    return cls(cls.Config(**settings), registered)


def run_benchmarks(
    benchmarks: Mapping[str, OpenBenchmark],
    output: Path,
    answer: Answer,
    asked: Asked | None = None,
) -> dict[str, Path]:
    """Answer, score and write `<output>/<name>/results.json` of each (`<name>-<control>`); return their paths.

    What a call that was interrupted has answered is not asked again. Several ranks share the items, each exactly
    once; rank 0 writes the results. `answer` is not called where nothing is left.
    Raises ValueError, on all ranks, for a control that is not possible and for answers of other settings; OSError.
    """
    from minigpt4.common.dist_utils import main_print

    asked, paths = asked or Asked(), {}
    for name, (benchmark, items) in benchmarks.items():
        folder = Path(output) / (f"{name}-{asked.control}" if asked.control else name)
        paths[name] = _run(
            OpenBenchmark(benchmark, with_control(items, asked.control)),
            name,
            folder,
            answer,
            asked,
        )
        main_print(summary(paths[name]))
    return paths


def _run(opened: OpenBenchmark, name: str, folder: Path, answer: Answer, asked: Asked) -> Path:
    """Run one benchmark and return the path of its results.json."""
    from minigpt4.common.dist_utils import barrier, from_main, get_rank, get_world_size

    (benchmark, items), ids = opened, [item.id for item in opened.items]
    prompt, files = benchmark.prompt(), {path.name: file_sha256(path) for path in benchmark.files}
    settings = {
        "benchmark": benchmark.name,
        "control": asked.control,
        "prompt": prompt.text,
        "data": files,
    }
    settings |= {
        key: getattr(benchmark.cfg, key) for key in ("max_new_tokens", "max_images", "ranking")
    }
    drawn = {key: getattr(benchmark.cfg, key, None) for key in ("temperature", "resample")}
    # not there by default: older answers go on
    settings |= {key: value for key, value in drawn.items() if value}
    shared = SharedAnswers(folder, settings | dict(asked.settings))
    with ExitStack() as held:  # by rank 0
        from_main(lambda: held.enter_context(shared.locked()))
        lines = from_main(lambda: shared.collect(ids))

        # this rank's share of what has no answer yet
        start = time.perf_counter()
        left = [item for item in items if "answer" not in lines.get(item.id, {})]
        if share := left[get_rank() :: get_world_size()]:
            shared.add(get_rank(), _checked(benchmark.answers(share, answer), share, name))
        barrier()

        def write() -> Path:
            seconds = time.perf_counter() - start
            run = Run(name, benchmark, items, shared.collect(ids), settings, seconds, len(left))
            return write_results(run, folder, asked.details)

        return from_main(write)


def _checked(lines: Iterable[dict], items: Sequence[BenchmarkItem], name: str) -> Iterator[dict]:
    """Yield the lines, with a progress bar on rank 0. Raises ValueError unless each item gets exactly one."""
    from tqdm import tqdm

    from minigpt4.common.dist_utils import is_main_process

    waiting = {item.id for item in items}
    for line in tqdm(
        lines, total=len(items), desc=name, unit="item", disable=not is_main_process()
    ):
        if line["id"] not in waiting:
            raise ValueError(f"{name}: '{line['id']}' was answered twice, or was not asked")
        waiting.remove(line["id"])
        yield line
    if waiting:
        raise ValueError(f"{name}: {len(waiting)} items got no answer, first '{min(waiting)}'")
