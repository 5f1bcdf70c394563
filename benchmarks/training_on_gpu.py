"""The steps of `benchmarks gpu --part train`."""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import blip2, energy, parity, train, workload
from benchmarks.harness import NotEqual, row
from minigpt4.common.cuda_graphs import Recorder

# GPU steps of a stage's official training: 4 epochs of 5,000 on 4 GPUs, 5 of 200 on one. Source: the 2023 release
OFFICIAL_STEPS = {1: 4 * 4 * 5000, 2: 5 * 200}
# how long steps are repeated to measure their energy: the driver updates its figure only ten times a second
ENERGY_SECONDS = 8
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Step = tuple[str, Callable[[], dict], int]


def steps(args: Namespace) -> Iterator[Step]:
    """Yield (name, step, its limit in seconds), the most valuable figures first."""
    training = Training(args)
    batch = {
        stage: 8 if args.rehearsal else size for stage, size in workload.OFFICIAL_BATCH.items()
    }
    yield "parity at the width of 7B", partial(training.parity, False), 45
    yield "parity, compiled", partial(training.parity, True), 60
    yield "model", training.build, 60
    for stage in (1, 2):
        step = partial(training.stage, stage, batch[stage], ("2023", "default"), True)
        yield f"stage {stage}", step, 60
    ways = ("2023", "lean", "compiled", "default")
    yield "stage 1, batch 16", partial(training.stage, 1, 16, ways), 25
    for stage in (1, 2):
        step = partial(training.kernels, stage, batch[stage])
        yield f"kernels of a step, stage {stage}", step, 20
    ways = ("2023", "transformers", "padded", "packed", "lean", "compiled", "default")
    for stage in (1, 2):
        step = partial(training.stage, stage, batch[stage], ways)
        yield f"stage {stage}, the ways between", step, 45
    yield "attention of the ViT", partial(training.vision, batch.values()), 25


class Training:
    """What the steps share: one model for all of them, and whether parity holds."""

    def __init__(self, args: Namespace):
        self.args, self.device = args, torch.device("cuda")
        self.size = "7b-thin" if args.rehearsal else "7b"
        self.is_exact = self.may_compile = False

    def parity(self, compiled: bool) -> dict:
        """Return rows of both stages' errors, on two layers of 7B. Raises NotEqual where they are too large.

        `compiled`: include the compiled ways; if they pass, training compiles by default in the later steps.
        """
        if self.args.rehearsal:
            return self._every_way(compiled)
        args = Namespace(size="slice", batch=4, batches=2, quantised=False, compiled=compiled)
        rows, errors = [], {}
        for stage in workload.STAGES:
            errors[stage] = parity.measure(args, stage, self.device, "fp16")[0]
            rows += parity.rows_of(stage, errors[stage], "fp16")
        parity.print_table(errors, "fp16")
        if not all(each["passed"] for each in rows):
            raise NotEqual(f"the errors are too large: {errors}")
        self.is_exact, self.may_compile = True, compiled
        return {"rows": rows, "errors": errors}

    def _every_way(self, compiled: bool) -> dict:
        """Run the ways that `parity` compares, for a rehearsal, in which values mean nothing."""
        model = workload.random_model("slice", torch.float16, self.device)
        model.kept_recorder = Recorder(is_checked=False)
        if compiled:
            parity.compile_vision(model)
        batch = workload.batches(model, 1, 2, 1)[0]
        for way in parity.WAYS + parity.COMPILED * compiled:
            self._pass(model, blip2.blip2(model), way, batch)
        self.is_exact, self.may_compile = True, compiled
        return {}

    def build(self) -> dict:
        """Make the model with random weights on the GPU; measure the GPU's matrix products."""
        if not self.is_exact:
            raise NotEqual("the ways do not agree: no speed is measured")
        self.ceiling = train.matmul_flops(self.device, "fp16")
        self.model = workload.random_model(self.size, torch.float16, self.device)
        self.model.kept_recorder = Recorder(is_checked=not self.args.rehearsal)
        self.stock, self.joules = blip2.blip2(self.model), energy.joules()
        if self.may_compile:
            parity.compile_vision(self.model)
        if self.args.rehearsal:  # the choice compares logits, which mean nothing there
            path = "compiled" if self.may_compile else "lean"
        else:
            path = workload.chosen_path(self.model, self.may_compile)
        self.default = "recorded" if path == "compiled" else path
        return {
            "default": self.default,
            "matmul TFLOP/s": self.ceiling / 1e12,
            "GiB": torch.cuda.max_memory_allocated() / 2**30,
        }

    def stage(
        self, stage: int, batch_size: int, ways: tuple[str, ...], is_judged: bool = False
    ) -> dict:
        """Return rows of a training step of each way beside the first one; "default" is what a user gets.

        `is_judged`: the default has to reach its gate, and its energy and cost are measured too.
        """
        workload.use_stage(self.model, stage)
        batches = workload.batches(self.model, stage, batch_size, 2)
        paths = {way: self.default if way == "default" else way for way in ways}
        found = self._turns(paths, batches)
        with torch.compiler.set_stance("force_eager"):
            useful = sum(workload.useful_flops(self.model, each) for each in batches) / len(batches)
        rows, old = [], found[ways[0]]["seconds"]
        for way in ways[1:]:
            label = f"default ({self.default})" if way == "default" else way
            name = f"stage {stage}: step, {self.size}, batch {batch_size}, {label}"
            gate = train.GATES.get((self.size, stage)) if is_judged else None
            seconds = found[way]["seconds"]
            rows.append(row(name, "s", seconds, old, limit=useful / self.ceiling, at_least=gate))
        if is_judged:
            step = partial(self._step, self.default, batches[0])
            rows += self._official(stage, batch_size, step, median(seconds))
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return {
            "rows": rows,
            "samples/s": {way: batch_size / median(each["seconds"]) for way, each in found.items()},
            "GiB that recordings and caches hold": held / 2**30,
            **found,
        }

    def _step(self, way: str, batch: dict) -> None:
        self.model.zero_grad()
        self._pass(self.model, self.stock, way, batch)

    def _pass(self, model: torch.nn.Module, stock: torch.nn.Module, way: str, batch: dict) -> None:
        loss = parity.loss_of(model, stock, way, batch)
        # transformers' backward reads shapes from values on the device, and a rehearsal has no values
        if not (self.args.rehearsal and way == "transformers"):
            loss.backward()

    def _turns(
        self, paths: dict[str, str], batches: list[dict], rounds: int = 5
    ) -> dict[str, dict]:
        """Return {way: {"seconds" and "host": [of a step in each round], "GiB": peak memory}}; the ways alternate.

        `paths`: {way: its path}. "host": until all of the step's kernels are launched. Two rounds come first to warm up;
        the second one records CUDA graphs. GiB do not count what recordings hold.
        """
        found = {way: {"seconds": [], "host": [], "GiB": 0.0} for way in paths}
        for number in range(-2, rounds):
            for way in list(paths)[:: 1 if number % 2 else -1]:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                for batch in batches:
                    self._step(paths[way], batch)
                host = time.perf_counter() - start
                torch.cuda.synchronize()
                if number >= 0:
                    found[way]["seconds"].append((time.perf_counter() - start) / len(batches))
                    found[way]["host"].append(host / len(batches))
                    found[way]["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        return found

    def _official(
        self, stage: int, batch_size: int, step: Callable[[], None], seconds: float
    ) -> list[dict]:
        """Return rows of energy per sample, and of GPU hours, energy and cost of the stage's official training.

        `step` takes `seconds`; without an energy counter there are no rows of energy.
        """
        hours = OFFICIAL_STEPS[stage] * seconds / 3600
        name = f"stage {stage} as published"
        rows = [
            row(f"{name}: GPU hours", "h", [hours]),
            row(f"{name}: cost", "", [hours * self.args.price]),
        ]
        if self.joules is None:
            return rows
        torch.cuda.synchronize()
        count, start, before = 0, time.perf_counter(), self.joules()
        while time.perf_counter() - start < ENERGY_SECONDS:
            step()
            torch.cuda.synchronize()
            count += 1
        per_step = (self.joules() - before) / count
        kwh = per_step * OFFICIAL_STEPS[stage] / 3.6e6
        return [
            row(f"stage {stage}: energy a sample", "J", [per_step / batch_size]),
            *rows,
            row(f"{name}: energy", "kWh", [kwh]),
        ]

    def kernels(self, stage: int, batch_size: int) -> dict:
        """Return the kernels of a training step by the default path, by time."""
        workload.use_stage(self.model, stage)
        batch = workload.batches(self.model, stage, batch_size, 1)[0]
        self._step(self.default, batch)
        return kernels_by_time(partial(self._step, self.default, batch))

    @torch.no_grad()
    def vision(self, sizes: list[int]) -> dict:
        """Return milliseconds of the vision part by attention kernel and batch: the first call, and those after it."""
        found = {}
        # cuDNN needs a real driver, which a rehearsal may lack
        names = [name for name in ATTENTION if not (self.args.rehearsal and name == "cudnn")]
        for name, size in itertools.product(names, sizes):
            image = torch.randn(
                size, 3, self.model.image_size, self.model.image_size, device=self.device
            )
            times = []
            with sdpa_kernel(ATTENTION[name]), torch.compiler.set_stance("force_eager"):
                for _ in range(5):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    workload.image_embeds(self.model, image)
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) * 1e3)
            found[f"{name}, batch {size}"] = {"first": times[0], "then": median(times[1:])}
        return {"ms": found}


def kernels_by_time(step: Callable[[], object]) -> dict:
    """Return {"ms": time of all kernels that `step()` launches, "top": [(name, count, ms)] of the 30 that take longest}."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    # events of operators and profiled regions on the CPU would count the kernels' time once more
    on_gpu = torch.autograd.DeviceType.CUDA
    averages = [each for each in profile.key_averages() if each.device_type == on_gpu]
    averages.sort(key=lambda each: -each.self_device_time_total)
    top = [(each.key[:90], each.count, each.self_device_time_total / 1e3) for each in averages[:30]]
    return {"ms": sum(each.self_device_time_total for each in averages) / 1e3, "top": top}
