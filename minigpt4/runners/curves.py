"""The curves of a run: `metrics.jsonl` read back, and drawn as `loss.png`."""

import io
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_MOST_POINTS = 2000  # drawn per curve
_WINDOW_SHARE = 30  # the smoothing window is a 30th of the steps
_LONGEST_WINDOW = 100
VALIDATION_LINES = {  # key of a validation record: (suffix of its label, line style, marker)
    "loss": ("", "-", "o"),
    "blank_loss": (", blank image", ":", "s"),
    "wrong_loss": (", wrong image", "--", "^"),
}
_SPLIT_COLOURS = ("#cf222e", "#8250df", "#1a7f37", "#bf8700")
_TRAIN_COLOUR, _LR_COLOUR = "#0969da", "#8c959f"


class Metrics(NamedTuple):
    """The records of `metrics.jsonl` in the order of steps; of a step done twice, as after a resume, the last."""

    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    def up_to(self, num_steps: int) -> "Metrics":
        """Return the records of the first `num_steps` steps: a killed process may have trained more, which are lost."""
        steps = [record for record in self.steps if record["step"] < num_steps]
        # those at `num_steps` are of the weights after these steps
        return Metrics(steps, [each for each in self.validations if each["step"] <= num_steps])


def read_metrics(folder: Path) -> Metrics:
    """Return the records of a run; skips lines that are half-written or of another kind. Raises OSError."""
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
    """Return the trailing mean over `window` values at each value."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0)
        means.append(total / min(index + 1, window))
    return means


def draw_runs(runs: Mapping[str, Metrics]) -> bytes:
    """Return a PNG with the loss, validation and learning-rate curves of `runs` {title: metrics}, side by side.

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
    window = max(1, min(_LONGEST_WINDOW, len(steps) // _WINDOW_SHARE))
    smooth_losses = smoothed(losses, window)
    every = -(-len(steps) // _MOST_POINTS)

    # the learning rate, on an axis of its own, below the other curves
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
    smooth_style = {"color": _TRAIN_COLOUR, "linewidth": 1.8, "label": label}
    axis.plot(numbers[::every], smooth_losses[::every], **smooth_style)
    validation_losses = _draw_validations(axis, metrics.validations)
    axis.plot([], [], color=_LR_COLOUR, linewidth=1, label="learning rate")  # for the legend

    axis.set(title=title, xlabel="step", ylabel="loss")
    # from 0, unless the losses of a task of the user's own are negative; single steps may go beyond
    lowest, highest = (limit([0, *smooth_losses, *validation_losses]) for limit in (min, max))
    axis.set_ylim(1.05 * lowest, 1.05 * highest if highest > lowest else 1)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, framealpha=0.9)


def _draw_validations(axis: Any, validations: Sequence[Mapping[str, Any]]) -> list[float]:
    """Draw the losses of each split; return all losses that were drawn."""
    by_split = defaultdict(list)
    for record in validations:
        by_split[record["validation"]].append(record)
    drawn = []
    for number, (split, records) in enumerate(by_split.items()):
        colour = _SPLIT_COLOURS[number % len(_SPLIT_COLOURS)]
        for key, (suffix, style, marker) in VALIDATION_LINES.items():
            known = [record for record in records if record.get(key) is not None]
            if known:
                steps = [record["step"] for record in known]
                losses = [record[key] for record in known]
                look = {"linestyle": style, "marker": marker, "markersize": 5, "color": colour}
                axis.plot(steps, losses, label=f"{split}{suffix}", **look)
                drawn += losses
    return drawn


def loss_picture(title: str, metrics: Metrics) -> bytes | None:
    """Return the PNG of a run; None with fewer than two points, or, with a warning, without matplotlib."""
    if sum(record["loss"] is not None for record in metrics.steps) < 2:
        return None
    try:
        return draw_runs({title: metrics})
    except ImportError as error:
        logging.warning("loss.png is not drawn (%s); pip install matplotlib", error)
        return None
