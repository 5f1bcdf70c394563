"""From the names of benchmarks to results: what `evaluate.py --tasks` calls.

benchmarks = open_benchmarks(cfg, ["pope", "vqav2"])              files are read and checked, no model is needed
run_benchmarks(benchmarks, Path("results"), answer)               answers, scores, results.json, results.html
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.utils import file_sha256
from minigpt4.evaluation.answer_file import AnswerFile
from minigpt4.evaluation.benchmarks.benchmark import Benchmark, BenchmarkConfig, BenchmarkItem
from minigpt4.evaluation.controls import with_control
from minigpt4.evaluation.results import Run, summary, write_results

# what answers items, in any order: {"id", "answer"} or {"id", "error"} each; cfg has batch_size and max_new_tokens
Answer = Callable[[Sequence[BenchmarkItem], BenchmarkConfig], Iterable[dict]]


class OpenBenchmark(NamedTuple):
    """A benchmark whose files were read and are in order."""

    benchmark: Benchmark
    items: list[BenchmarkItem]


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
    control: str = "",
    details: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Answer, score and write `<output>/<name>/results.json` of each (`<name>-<control>`); return their paths.

    What has been answered already, by a call that was interrupted, is not asked again. Several ranks share the items,
    each exactly once; rank 0 writes the results. `answer` is not called where nothing is left to answer. `details` go
    into the results; `details["weights"]`, hashes, are compared with those of earlier answers.
    Raises ValueError, on all ranks, for a control that is not possible and for answers of other settings or weights.
    """
    from minigpt4.common.dist_utils import main_print

    paths = {}
    for name, (benchmark, items) in benchmarks.items():
        folder = Path(output) / (f"{name}-{control}" if control else name)
        asked = with_control(items, control)
        paths[name] = run_benchmark(name, benchmark, asked, folder, answer, control, details or {})
        main_print(summary(paths[name]))
    return paths


def run_benchmark(
    name: str,
    benchmark: Benchmark,
    items: Sequence[BenchmarkItem],
    folder: Path,
    answer: Answer,
    control: str,
    details: Mapping[str, Any],
) -> Path:
    """Run one benchmark, as `run_benchmarks`; return the path of its results.json."""
    from minigpt4.common.dist_utils import barrier, get_rank, get_world_size

    file, ids = AnswerFile(folder), [item.id for item in items]
    settings = {
        "benchmark": benchmark.name,
        "control": control,
        "prompt": benchmark.prompt().text,
        "max_new_tokens": benchmark.cfg.max_new_tokens,
        "max_images": benchmark.cfg.max_images,
        "data": {path.name: file_sha256(path) for path in benchmark.files},
        "weights": details.get("weights", {}),
    }

    # this rank's share of what has no answer yet
    start = time.perf_counter()
    lines = _on_main(lambda: file.collect(ids, settings))
    left = [item for item in items if "answer" not in lines.get(item.id, {})]
    if share := left[get_rank() :: get_world_size()]:
        file.append(get_rank(), _checked(answer(share, benchmark.cfg), share, name))
    barrier()

    def write() -> Path:
        run = Run(name, benchmark, items, file.collect(ids, settings), settings, time.perf_counter() - start, len(left))
        return write_results(run, folder, details)

    return _on_main(write)


def _checked(lines: Iterable[dict], items: Sequence[BenchmarkItem], name: str) -> Iterable[dict]:
    """Yield the lines, with a progress bar on rank 0. Raises ValueError unless each item gets exactly one."""
    from tqdm import tqdm

    from minigpt4.common.dist_utils import is_main_process

    waiting = {item.id for item in items}
    for line in tqdm(lines, total=len(items), desc=name, unit="item", disable=not is_main_process()):
        if line["id"] not in waiting:
            raise ValueError(f"{name}: '{line['id']}' was answered twice, or was not asked")
        waiting.remove(line["id"])
        yield line
    if waiting:
        raise ValueError(f"{name}: {len(waiting)} items got no answer, first '{min(waiting)}'")


def _on_main(make: Callable[[], Any]) -> Any:
    """Return on every rank what `make` returns on rank 0; a user's mistake is raised on every rank too."""
    from minigpt4.common.dist_utils import from_main

    def attempt() -> Any:
        try:
            return make()
        except (ValueError, OSError) as error:
            return error

    result = from_main(attempt)
    if isinstance(result, Exception):
        raise result
    return result
