"""Draw the quickstart's figures: accuracies beside controls, and held-out images with answers (losses: runners/curves.py)."""

import base64
import io
import random
import textwrap
from pathlib import Path

ROWS, COLUMNS = 5, 4
RIGHT, WRONG = "#1a7f37", "#cf222e"
ACCURACIES = ("shape", "colour", "size", "position", "background", "count", "exact")
SERIES = {  # key of report.json: (label, colour)
    "held_out": ("after stage 2", "#0969da"),
    "after_stage1": ("after stage 1", "#80ccff"),
    "untrained_projection": ("untrained llama_proj", "#8c959f"),
    "wrong_picture": ("wrong image", "#d4a72c"),
    "blank_picture": ("blank image", "#e5b8b5"),
}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_accuracies(report: dict, path: Path) -> None:
    """Draw accuracies as bars, with marks for the best constant answer and for the linear probe."""
    pyplot = _pyplot()
    columns = {key: {**report[key], **_extras(report, key)} for key in SERIES}
    names = [*ACCURACIES, "left-out\nshape", "left-out\ncolour", "questions"]
    figure, axis = pyplot.subplots(figsize=(11, 3.6))
    width = 0.8 / len(SERIES)
    for place, (key, (label, colour)) in enumerate(SERIES.items()):
        lefts = [i + (place - 2) * width for i in range(len(names))]
        heights = [columns[key].get(name, 0.0) for name in names]
        axis.bar(lefts, heights, width, label=label, color=colour)
    # one entry of the legend for all marks of a kind
    for i, name in enumerate(names):
        if name in report["best_constant"]:
            level = report["best_constant"][name]
            label = "best constant answer" if i == 0 else None
            axis.plot([i - 0.42, i + 0.42], [level, level], "k--", linewidth=1, label=label)
        if name in report["linear_probe"]["held_out"]:
            level = report["linear_probe"]["held_out"][name]
            label = "linear probe: what vision knows" if i == 0 else None
            axis.plot(i - 2 * width, level, "k^", markersize=5, label=label)
    labels = ["whole\nimage" if name == "exact" else name for name in names]
    axis.set_xticks(range(len(names)), labels)
    axis.set(ylim=(0, 1.05), ylabel="share right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _extras(report: dict, key: str) -> dict[str, float]:
    """Return the accuracies of a series that do not stand in its own section of the report."""
    if key == "held_out":
        left_out = {f"left-out\n{name}": value for name, value in report["left_out_pairs"].items()}
        return {**left_out, "questions": report["questions"]["all"]}
    if key == "after_stage1":
        return {"questions": report["questions_after_stage1"]["all"]}
    return {}


def draw_images(answers: list[dict], path: Path) -> None:
    """Draw a 5 x 4 sheet of a random sample of `answers` (records of answers.jsonl); wrong ones are red and framed."""
    pyplot = _pyplot()
    from PIL import Image

    chosen = random.Random(0).sample(answers, min(ROWS * COLUMNS, len(answers)))
    figure = pyplot.figure(figsize=(3.3 * COLUMNS, 4.1 * ROWS))
    grid = figure.add_gridspec(
        ROWS * 2, COLUMNS, height_ratios=[2.5, 1.6] * ROWS, hspace=0.06, wspace=0.08
    )
    for number, record in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        image = figure.add_subplot(grid[2 * row, column])
        image.imshow(Image.open(io.BytesIO(base64.b64decode(record["picture"]))))
        image.set(xticks=[], yticks=[])
        colour, linewidth = (RIGHT, 1) if record["is_right"] else (WRONG, 4)
        for side in image.spines.values():
            side.set(color=colour, linewidth=linewidth)
        text = figure.add_subplot(grid[2 * row + 1, column])
        text.axis("off")
        _write(text, record)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.995, bottom=0.005)
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def _write(axis, record: dict) -> None:
    """Write verdict, description, question and answer, one below the other."""
    if record["is_right"]:
        verdict, colour = "right", RIGHT
    else:
        verdict, colour = "WRONG: " + (", ".join(record["wrong"]) or "too much said"), WRONG
    if record["answer_is_right"]:
        mark, answer_colour = "right", RIGHT
    else:
        mark, answer_colour = f"WRONG, {record['expected']}", WRONG
    answer = f"{record['question']} - {record['answer']} ({mark})"
    blocks = [
        (verdict, 42, {"weight": "bold", "color": colour}),
        (record["description"], 50, {}),
        (answer, 50, {"style": "italic", "color": answer_colour}),
    ]
    top = 1.0
    for text, width, style in blocks:
        lines = textwrap.wrap(text, width, max_lines=6, placeholder=" ...")
        axis.text(0, top, "\n".join(lines), va="top", fontsize=8, **style)
        top -= 0.108 * len(lines) + 0.03
