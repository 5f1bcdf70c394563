"""One table of what counts: ours, what 2023 computes, what transformers gives today; each part in its own process.

Parity comes first: where loss or gradient differ, no speed is measured.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median, stdev

from benchmarks import chat, data, flops, load, machine, memory, parity, train
from benchmarks.processes import measure

HELP = "everything that needs no GPU, as one table; --quick: in less than five minutes on two cores"
PARTS = {  # command -> (options of --quick, options otherwise)
    "parity": (["--batches", "1"], []),
    "train": (["--rounds", "3"], []),
    "load": (["--rounds", "1"], []),
    "chat": (["--rounds", "3", "--turns", "2"], []),
    "data": (["--rounds", "6", "--pictures", "320", "--size", data.JUDGED], []),
    "flops": (["--quick"], ["--quick"]),
    "memory": (["--quick"], ["--quick"]),
    "startup": (["--size", "toy", "--rounds", "1", "--quick"], ["--size", "toy"]),
}
ON_CPU = {"parity", "train"}  # parts that would take a GPU where there is one
COUNTED = {"flops", "memory"}  # parts that measure no time, and run side by side


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="fewer rounds")


def run(args):
    """Measure, print the table, return its rows and the figures of all parts."""
    start, parts, rows = time.perf_counter(), {}, []
    measured = {
        name: partial(measure, name, *options[not args.quick], *(["--device", "cpu"] if name in ON_CPU else []))
        for name, options in PARTS.items()
    }
    for name in PARTS:
        if name not in COUNTED:
            parts[name] = measured[name]()
        if name == "parity" and not parts[name]["passed"]:
            break
    else:
        with ThreadPoolExecutor() as pool:
            counting = {name: pool.submit(measured[name]) for name in PARTS if name in COUNTED}
        parts |= {name: counted.result() for name, counted in counting.items()}
    for name, figures in parts.items():
        rows += ROWS[name](figures)
    seconds = time.perf_counter() - start
    print_table(rows)
    passed = all(row["passed"] for row in rows)
    if len(parts) == 1:
        print("FAIL: the errors are too large, no speed is shown")
    else:
        print(f"{'PASS' if passed else 'FAIL'} in {seconds:.0f} s")
    result = {"rows": rows, "parts": parts, "seconds": seconds, "quick": args.quick, "passed": passed}
    return result | machine.description("transformers", "timm")


def row(name, unit, ours, old=None, stock=None, *, more_is_better=False, share=None, at_least=None, at_most=None):
    """Return a row; `ours`, `old` (2023) and `stock` (transformers) hold a value for each round, taken side by side.

    `share`: of the limit. `at_least`: what the ratio to 2023 has to reach; `at_most`: what `ours` may be.
    """
    found = {"name": name, "unit": unit, "ours": ours, "2023": old, "transformers": stock, "share": share}
    found |= {"ratio": None, "error": None, "at_least": at_least, "at_most": at_most}
    if old:
        ratios = [a / b if more_is_better else b / a for a, b in zip(ours, old, strict=True)]
        found["ratio"] = median(ratios)
        found["error"] = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    is_enough = at_least is None or found["ratio"] >= at_least
    return found | {"passed": is_enough and (at_most is None or max(ours) <= at_most)}


def of_parity(figures):
    """The worst of our ways, for each stage; transformers' beside it."""
    rows = []
    for stage, errors in figures["errors"].items():
        worst = {kind: max(errors[way][kind] for way in parity.OURS) for kind in errors["2023"]}
        for kind in ("loss", "gradient"):
            name = f"stage {stage}: {kind} error, float32"
            other = [errors["transformers"][kind]]
            rows.append(row(name, "", [worst[kind]], stock=other, at_most=parity.FLOAT32_LIMIT))
        values = ([errors[way]["half gradient"]] for way in ("2023", "transformers"))
        name, least = f"stage {stage}: gradient error, {figures['dtype']}", 1 / parity.HALF_LIMIT
        rows.append(row(name, "", [worst["half gradient"]], *values, at_least=least))
    return rows


def of_train(figures):
    rows = []
    for stage, found in figures["stages"].items():
        seconds = found["seconds"] or {}
        values = [seconds.get(way) for way in ("lean", "2023", "transformers")]
        if all(values):
            name = f"stage {stage}: step, {figures['size']} {figures['dtype']}"
            gate = train.GATES.get((figures["size"], int(stage)))
            rows.append(row(name, "s", *values, share=found["share of limit"]["lean"], at_least=gate))
    return rows


def of_load(figures):
    """Medians: ours is built more often than 2023's."""
    values = lambda kind, key: [median(result[key] for result in figures["rounds"][kind])]  # noqa: E731
    return [
        row(name, unit, values("ours", key), values("2023", key), at_least=load.GATES[key])
        for name, unit, key in (("ViT-g: build", "s", "seconds"), ("ViT-g: private memory", "MiB", "private_mib"))
    ]


def of_chat(figures):
    rows, speeds = [], figures["tokens_per_s"]
    for turn, found in figures["first_token_s"].items():
        values, gate = (found[way] for way in ("prefix cache", "full prefill")), chat.GATES[int(turn)]
        rows.append(row(f"chat: first token of turn {turn}", "s", *values, at_least=gate))
    return [*rows, row("chat: tokens a second", "1/s", speeds["engine"], stock=speeds["generate"])]


def of_data(figures):
    """The limit is what Pillow takes to decode, crop and resize, and nothing else."""
    rows = []
    for size, found in figures["sizes"].items():
        speeds, gate = found["pictures_per_second"], data.GATES["speed"] if size == data.JUDGED else None
        share = found["ratio"]["speed"] / found["ratio_of_pillow_alone"]
        options = {"more_is_better": True, "share": share, "at_least": gate}
        rows.append(row(f"data: images of {size}, a core", "1/s", speeds["ours"], speeds["2023"], **options))
    return rows


def of_flops(figures):
    rows, ways = [], {(found["stage"], found["way"]): found for found in figures["rows"] if found["size"] == "7b"}
    for stage in flops.BATCHES:
        ours = ways[stage, "lean"]
        values = ([ways[stage, way]["flops"] / 1e12] for way in ("lean", "2023"))
        share, most = ours["useful"] / ours["flops"], flops.LIMIT * ours["useful"] / 1e12
        rows.append(row(f"stage {stage}: 7B step, executed", "TFLOP", *values, share=share, at_most=most))
    return rows


def of_memory(figures):
    rows = []
    for found in figures["rows"]:
        if (found["size"], found["kind"], found["checkpointing"]) == ("7b", "none", False):
            stage = found["stage"]
            name, old = f"stage {stage}: 7B peak, batch {found['batch']}", [figures["2023"][str(stage)]]
            gate = memory.GATES[stage]
            rows.append(row(name, "GiB", [found["peak"]], old, share=memory.FLOOR_KB / found["kb"], at_most=gate))
    return rows


def of_startup(figures):
    """2023's loading of the weights; the rest of the start, mostly imports, is ours in both."""
    ways = (figures["rounds"][way] for way in ("ours", "loaded as in 2023"))
    seconds = [[sum(result["seconds"].values()) for result in results] for results in ways]
    return [row(f"start to the end of the first step, {figures['size']}", "s", *seconds)]


ROWS = {
    "parity": of_parity,
    "train": of_train,
    "load": of_load,
    "chat": of_chat,
    "data": of_data,
    "flops": of_flops,
    "memory": of_memory,
    "startup": of_startup,
}


def print_table(rows):
    heads = ("ours", "2023", "transformers", "times better than 2023", "of limit", "needed")
    widths = (14, 14, 14, 24, 10, 12)
    print(f"\n{'median of the rounds':<44}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    for found in rows:
        unit = f" {found['unit']}" if found["unit"] else ""
        cells = [f"{median(found[way]):.3g}{unit}" if found[way] else "-" for way in ("ours", "2023", "transformers")]
        error = f" +- {found['error']:.2g}" if found["error"] is not None else ""
        cells.append(f"{found['ratio']:.3g}{error}" if found["ratio"] else "-")
        cells.append(f"{found['share']:.0%}" if found["share"] else "-")
        least, most = found["at_least"], found["at_most"]
        needed = f">= {least:.3g}x" if least is not None else f"<= {most:.3g}" if most is not None else "-"
        cells.append(needed if found["passed"] else f"{needed} FAIL")
        print(f"{found['name']:<44}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True)))
