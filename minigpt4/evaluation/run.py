"""Run benchmarks by name and write their results: what `evaluate.py --tasks` calls.

add_benchmark_arguments(parser)                                       --tasks, --control, --compare
evaluate_benchmarks(Config(args), args.tasks, output, args.device, args.control)
"""

from __future__ import annotations

import hashlib
import json
import os
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
from minigpt4.common.utils import cached_path, expand_path, file_sha256
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.controls import CONTROLS, original_images, with_control
from minigpt4.evaluation.results import Run, summary, write_results
from minigpt4.evaluation.shared_answers import SharedAnswers

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat, Conversation

# Answers items, in any order: one {"id", "answer"} or {"id", "error"} for each. The config has batch size and sampling.
Answer = Callable[[Sequence[BenchmarkItem], BenchmarkConfig], Iterable[dict]]

PATIENCE_S = 1800  # a rank waits so long for a new answer of the others


class OpenBenchmark(NamedTuple):
    """A benchmark whose files have been read and checked."""

    benchmark: Benchmark
    items: list[BenchmarkItem]


@dataclass
class Asked:
    """How the benchmarks are asked.

    `settings`: what the answers depend on besides the benchmark, such as the weights; answers produced under different
    settings are never mixed. `details` are copied into the results.
    """

    control: str = ""  # one of controls.CONTROLS
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def add_benchmark_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark options of evaluate.py."""
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
    """Answer the benchmarks of `evaluation_datasets` with the model of `cfg`; return the path of each results.json.

    All files are checked before the model is loaded, and it is loaded only if something is left to answer. The ranks
    of torchrun share the items. Raises ConfigError, and ValueError or OSError as `run_benchmarks`.
    """
    from minigpt4 import load_config
    from minigpt4.common.dist_utils import from_main, init_distributed_mode, leave_process_group
    from minigpt4.common.launchers import launched_processes
    from minigpt4.evaluation.answer_file import settings_of
    from minigpt4.evaluation.answering import answers

    # Loading the model takes minutes, so everything that can be refused is refused first.
    benchmarks = open_benchmarks(cfg, names)
    for name, (_, items) in benchmarks.items():
        with_control(items, control)
        _check_questions(items, name)
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

    # The results identify the checkpoint by the hash of the whole file, frozen weights by a sample of their bytes.
    ckpt = cached_path(cfg.model_cfg.ckpt) if cfg.model_cfg.get("ckpt") else None
    settings = from_main(lambda: settings_of(cfg))
    weights = from_main(lambda: {ckpt.name: file_sha256(ckpt)} if ckpt and ckpt.is_file() else {})
    details = {"weights": weights, "model": settings, "config": cfg.to_dict()}
    try:
        paths = run_benchmarks(benchmarks, output, answer, Asked(control, settings, details))
    except BaseException:
        leave_process_group(after_error=True)
        raise
    leave_process_group()
    return paths


def _check_questions(items: Sequence[BenchmarkItem], name: str) -> None:
    """Raise ValueError for a question that the chat would refuse; `name` is the benchmark's section."""
    from minigpt4.conversation.chat import check_question

    for item in items:
        try:
            check_question(item.question)
        except ValueError as error:
            raise ValueError(f"evaluation_datasets.{name}: item '{item.id}': {error}") from error


def open_benchmarks(cfg: Config, names: Iterable[str]) -> dict[str, OpenBenchmark]:
    """Return the benchmarks of the sections `evaluation_datasets.<name>`, by name; no model is needed.

    Raises ConfigError with everything that is wrong with any of them: names, keys, files, images.
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
    """Answer and score each benchmark, write `<output>/<name>[-<control>]/results.json`, and return their paths.

    Answers of an interrupted call are reused. The ranks share the items, each item is asked exactly once, and rank 0
    writes the results. `answer` is not called if every item has an answer.
    Raises ValueError, on all ranks, for a control that is not possible and for answers of other settings; OSError.
    """
    from minigpt4.common.dist_utils import main_print

    asked = asked or Asked()
    paths = {}
    for name, (benchmark, items) in benchmarks.items():
        folder = Path(output) / (f"{name}-{asked.control}" if asked.control else name)
        opened = OpenBenchmark(benchmark, with_control(items, asked.control))
        paths[name] = _run(opened, name, folder, answer, asked)
        main_print(summary(paths[name]))
    return paths


def _run(opened: OpenBenchmark, name: str, folder: Path, answer: Answer, asked: Asked) -> Path:
    """Run one benchmark and return the path of its results.json."""
    from minigpt4.common.dist_utils import from_main, get_rank, get_world_size, patient_barrier

    benchmark, items = opened
    ids = [item.id for item in items]
    settings = _settings(benchmark, items, asked.control)
    shared = SharedAnswers(folder, settings | dict(asked.settings))
    with ExitStack() as stack:
        # Only rank 0 locks the folder and merges what earlier calls answered.
        from_main(lambda: stack.enter_context(shared.locked()))
        lines = from_main(lambda: shared.collect(ids))

        # Each rank answers its share of the items that have no answer yet.
        start = time.perf_counter()
        unanswered = [item for item in items if "answer" not in lines.get(item.id, {})]
        if share := unanswered[get_rank() :: get_world_size()]:
            lines = benchmark.answers(share, _noted(answer))
            shared.add(get_rank(), _checked(lines, share, name))
        if not patient_barrier(PATIENCE_S):
            raise OSError(
                f"{name}: the other ranks have answered nothing for {PATIENCE_S} s; what is answered is kept: call again"
            )

        def write() -> Path:
            seconds = time.perf_counter() - start
            lines = shared.collect(ids)
            run = Run(name, benchmark, items, lines, settings, seconds, len(unanswered))
            return write_results(run, folder, asked.details)

        return from_main(write)


def _settings(benchmark: Benchmark, items: Sequence[BenchmarkItem], control: str) -> dict[str, Any]:
    """Return everything about a benchmark that its answers depend on, the contents of its files included."""
    img_path = benchmark.cfg.img_path
    settings = {
        "benchmark": benchmark.name,
        "control": control,
        "prompt": benchmark.prompt().text,
        "data": _hashes(benchmark.files),
        "img_path": os.path.abspath(expand_path(img_path)) if img_path else "",
        "questions": _questions_sha256(items),
    }
    for key in ("max_new_tokens", "max_images", "ranking", "temperature", "resample"):
        if hasattr(benchmark.cfg, key):
            settings[key] = getattr(benchmark.cfg, key)
    # Greedy answers do not depend on the seed.
    if benchmark.cfg.temperature > 0:
        settings["seed"] = benchmark.cfg.seed
    return settings


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of each file by its path below their common folder; MME's subtasks have files of equal names."""
    paths = [path.absolute() for path in files]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in paths}


def _questions_sha256(items: Sequence[BenchmarkItem]) -> str:
    """Return a hash of what is asked: ids, questions, options, and images (a path, or the pixels of a PIL image)."""
    digest = hashlib.sha256()
    for item in items:
        images = []
        for image in original_images(item):
            is_path = isinstance(image, (str, Path))
            images.append(
                os.path.abspath(image) if is_path else hashlib.sha256(image.tobytes()).hexdigest()
            )
        digest.update(json.dumps([item.id, item.question, list(item.options), images]).encode())
    return digest.hexdigest()


def _noted(answer: Answer) -> Answer:
    """Return `answer` that tells the waiting ranks of each line, also of one that its benchmark asks again."""
    from minigpt4.common.dist_utils import note_progress

    def noted(items: Sequence[BenchmarkItem], cfg: BenchmarkConfig) -> Iterator[dict]:
        for line in answer(items, cfg):
            note_progress()
            yield line

    return noted


def _checked(lines: Iterable[dict], items: Sequence[BenchmarkItem], name: str) -> Iterator[dict]:
    """Yield the lines, with a progress bar on rank 0. Raises ValueError unless each item is answered exactly once."""
    from tqdm import tqdm

    from minigpt4.common.dist_utils import is_main_process

    unanswered = {item.id for item in items}
    for line in tqdm(
        lines, total=len(items), desc=name, unit="item", disable=not is_main_process()
    ):
        if line["id"] not in unanswered:
            raise ValueError(f"{name}: '{line['id']}' was answered twice, or was not asked")
        unanswered.remove(line["id"])
        yield line
    if unanswered:
        first = min(unanswered)
        raise ValueError(f"{name}: {len(unanswered)} items got no answer, first '{first}'")
