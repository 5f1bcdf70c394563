"""The curves of a run: `metrics.jsonl` read back, and drawn as `loss.png`."""

import io
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MOST_POINTS = 2000  # of a curve that is drawn
_SHARE = 30  # the smoothed curve is a mean over one step in so many
VALIDATION_LINES = {  # key of a validation's line: (words, line style, marker)
    "loss": ("", "-", "o"),
    "blank_loss": (", blank image", ":", "s"),
    "wrong_loss": (", wrong image", "--", "^"),
}
_COLOURS = ("#cf222e", "#8250df", "#1a7f37", "#bf8700")  # of the splits
_TRAIN_COLOUR, _LR_COLOUR = "#0969da", "#8c959f"


class Metrics(NamedTuple):
    """The lines of `metrics.jsonl`, in the order of steps; of what was made twice, as before a resume, the last."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]


def read_metrics(folder: Path) -> Metrics:
    """Return the lines of a run; those that are half-written or of another kind are passed over. Raises OSError."""
    steps, validations = {}, {}
    with open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                step, split = record["step"], record.get("validation")
                float(step), float(record["loss"] or 0)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if split is None:
                steps[step] = record
            else:
                validations[step, split] = record
    ordered = sorted(validations.values(), key=lambda record: record["step"])
    return Metrics([steps[step] for step in sorted(steps)], ordered)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and those before it, `window` in all."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0)
        means.append(total / min(index + 1, window))
    return means


def draw_runs(runs: Mapping[str, Metrics]) -> bytes:
    """Return a PNG with the curves of runs side by side, {title: its metrics}: loss, validation, learning rate.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if len(runs) == 1 else 6.5 * len(runs), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axis, (title, metrics) in zip(panels, runs.items(), strict=True):
        _draw(axis, title, metrics)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw(axis: Any, title: str, metrics: Metrics) -> None:
    steps = [record for record in metrics.steps if record["loss"] is not None]
    numbers, losses = [record["step"] for record in steps], [record["loss"] for record in steps]
    window = max(1, min(100, len(steps) // _SHARE))
    every = -(-len(steps) // _MOST_POINTS)

    # the learning rate lies below all, on its own axis
    rates = axis.twinx()
    rates.plot(
        numbers[::every], [record["lr"] for record in steps][::every], color=_LR_COLOUR, linewidth=1
    )
    rates.set(ylabel="learning rate", ylim=(0, None))
    rates.yaxis.label.set_color(_LR_COLOUR)
    rates.tick_params(colors=_LR_COLOUR)
    axis.set_zorder(rates.get_zorder() + 1)
    axis.patch.set_visible(False)

    label = f"training, mean of {window} steps" if window > 1 else "training"
    axis.plot(numbers[::every], losses[::every], color=_TRAIN_COLOUR, alpha=0.3, linewidth=0.8)
    axis.plot(
        numbers[::every],
        smoothed(losses, window)[::every],
        color=_TRAIN_COLOUR,
        linewidth=1.8,
        label=label,
    )
    shown = [*smoothed(losses, window), *_draw_validations(axis, metrics.validations)]
    axis.plot([], [], color=_LR_COLOUR, linewidth=1, label="learning rate")

    axis.set(title=title, xlabel="step", ylabel="loss")
    axis.set_ylim(0, 1.05 * max(shown, default=1) or 1)  # raw values may reach beyond
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, framealpha=0.9)


def _draw_validations(axis: Any, validations: Sequence[Mapping[str, Any]]) -> list[float]:
    """Draw the losses of each split; return all that was drawn."""
    of_split = defaultdict(list)
    for record in validations:
        of_split[record["validation"]].append(record)
    drawn = []
    for number, (split, records) in enumerate(of_split.items()):
        for key, (words, style, marker) in VALIDATION_LINES.items():
            points = [
                (record["step"], record[key]) for record in records if record.get(key) is not None
            ]
            if points:
                colour = _COLOURS[number % len(_COLOURS)]
                look = {"linestyle": style, "marker": marker, "markersize": 5, "color": colour}
                axis.plot(*zip(*points, strict=True), label=f"{split}{words}", **look)
                drawn += [loss for _, loss in points]
    return drawn


def loss_picture(title: str, metrics: Metrics) -> bytes | None:
    """Return the PNG of a run; None, which is said, without matplotlib or with fewer than two points."""
    if sum(record["loss"] is not None for record in metrics.steps) < 2:
        return None
    try:
        return draw_runs({title: metrics})
    except ImportError as error:
        logging.warning("loss.png is not drawn (%s); pip install matplotlib", error)
        return None
