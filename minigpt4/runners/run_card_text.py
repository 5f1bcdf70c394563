"""`run_card.md`: the content of `run_card.json` as Markdown, for reading or for a model card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def card_text(card: Mapping[str, Any], picture: str | None) -> str:
    """Return the Markdown of a run card; `picture`: the name of the file with the curves, beside it."""
    sections = [
        _head(card),
        _result(card, picture),
        _validation(card["validation"]),
        _data(card["data"]),
        _model(card["model"]),
        _processes(card["processes"]),
        _recipe(card["recipe"]),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as the text of a table cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    text = number(value) if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float) -> str:
    """Return a loss as text: with four decimals, very small ones in scientific notation."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _head(card: Mapping[str, Any]) -> str:
    first, last = card["processes"][0], card["processes"][-1]
    return (
        f"# Training run {card['run']}\n\n{first['started']} to {last['ended']}; {card['outcome']}"
    )


def _result(card: Mapping[str, Any], picture: str | None) -> str:
    curve, result = card["curve"], card["result"]
    final = result["final_loss"]
    rows = [("steps", curve["steps"]), ("samples seen", result["samples_seen"])]
    if final:
        rows.append(
            ("final loss", f"{number(final['mean'])} (mean of the last {final['steps']} steps)")
        )
        places = ", ".join(f"{name} {_point(curve[name])}" for name in ("first", "lowest", "last"))
        rows.append(("loss", places))
    rows.append(("checkpoint", f"`{result['checkpoint']}`" if result["checkpoint"] else "none"))
    for part, digest in result["trained_sha256"].items():
        rows.append((f"trained: {part}, sha256", f"`{digest}`"))
    text = f"## Result\n\n{table(('', ''), rows)}"
    return f"{text}\n\n![Loss and learning rate]({picture})" if picture else text


def _point(point: Sequence[float]) -> str:
    step, loss = point
    return f"{number(loss)} at step {step:,}"


def _validation(validations: Sequence[Mapping[str, Any]]) -> str:
    if not validations:
        return ""
    shown = ("validation", "step", "epoch", "loss", "blank_loss", "wrong_loss", "items", "samples")
    present = set().union(*validations)
    keys = [key for key in shown if key in present]
    names = {"validation": "split", "blank_loss": "blank image", "wrong_loss": "wrong image"}
    rows = [list(map(record.get, keys)) for record in validations]
    return f"## Validation\n\n{table([names.get(key, key) for key in keys], rows)}"


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    if not data:
        return ""
    rows = []
    for name, found in data.items():
        size = f"{found['files']} files"
        if found["records"] is not None:
            size = f"{found['records']:,} records"
        skips = [f"{count:,} {reason}" for reason, count in found.get("skipped", {}).items()]
        skipped = ", ".join(skips) or "none"
        source = _source(found["source"])
        rows.append([name, source, size, found["sha"], found.get("samples"), skipped])
    columns = ("dataset", "source", "size", "hash of the listing", "samples trained on", "skipped")
    text = f"## Data\n\n{table(columns, rows)}"
    # the same for all datasets
    first = next(iter(data.values()))
    counted, ranks = first["counted_on_ranks"], first["ranks"]
    if counted != ranks:
        text += f"\n\nSamples are those of {counted} of {ranks} ranks."
    return text


def _source(source: Any) -> str:
    """Return where a dataset comes from: `storage` of its `build_info` if it has one, else all of `build_info`."""
    storage = source.get("storage") if isinstance(source, Mapping) else None
    if isinstance(storage, str):
        return f"`{storage}`"
    return f"`{json.dumps(storage or source, ensure_ascii=False)}`"


def _model(model: Mapping[str, Any]) -> str:
    rows = []
    for part in model["parts"]:
        if part["parameters"]:
            state = _frozen_state(model["frozen_sha256"].get(part["name"]))
            rows.append([part["name"], part["parameters"], part["trainable"], part["dtype"], state])
    columns = (
        "part",
        "parameters",
        "trained",
        "type",
        "sha256 of what is frozen, before and after",
    )
    text = f"## Model: {model['arch']}\n\n{table(columns, rows)}"
    if changed := model["changed_tensors"]:
        text += f"\n\n**Frozen weights that training changed:** {', '.join(changed[:20])}"
    return text


def _frozen_state(frozen: Mapping[str, Any] | None) -> str:
    """Return whether the frozen weights of a part, given their hashes, have changed."""
    if not frozen:
        return "trained"
    before = str(frozen["before"])[:16]
    if frozen["after"] is None:
        return f"`{before}` before; compared when the run is resumed and ends"
    after = frozen["after"][:16]
    if frozen["unchanged"]:
        return f"`{after}`, unchanged"
    return f"**changed** from `{before}` to `{after}`"


def _processes(processes: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for process in processes:
        seconds, steps = process["seconds"], process["steps"]
        reached = f"{steps[0]:,} to {steps[1]:,}" if steps else "none"
        device = process["hardware"]["gpus"][:1] or [process["hardware"]["cpu"]]
        machine = f"{process['ranks']} x {device[0]}"
        times = f"{seconds['start_up']} + {seconds['training']}, of it validation {seconds['of_it_validation']}"
        memory, outcome = process["peak_memory_mib"], process["outcome"]
        rows.append([process["started"], reached, machine, memory, times, outcome])
    columns = ("started", "steps", "ranks and machine", "peak memory, MiB")
    columns += ("seconds: start-up + training", "outcome")
    last = processes[-1]
    versions = ", ".join(f"{name} {value}" for name, value in last["versions"].items() if value)
    hardware = last["hardware"]
    size = f"{hardware['cores']} cores, {hardware['memory_gib']} GiB, {len(hardware['gpus'])} GPUs"
    where = f"{size}, {hardware['system']}"
    return f"## Machine\n\n{table(columns, rows)}\n\nVersions: {versions}. Machine: {where}."


def _recipe(recipe: Mapping[str, Any]) -> str:
    config = json.dumps(recipe["config"], indent=1, ensure_ascii=False)
    resumed = f"\n\nResumed from `{recipe['resumed_from']}`." if recipe["resumed_from"] else ""
    return (
        f"## Recipe\n\n```\n{recipe['command']}\n```{resumed}\n\n<details><summary>Configuration</summary>\n\n"
        f"```json\n{config}\n```\n\n</details>"
    )
