"""The two pictures of a quickstart: losses of both stages, and held-out pictures with what the model said."""

import base64
import io
import random
import textwrap
from pathlib import Path

ROWS, COLUMNS = 5, 4


def draw_losses(losses: dict[str, list[float]], path: Path) -> None:
    """`losses`: stage -> loss of each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(losses), figsize=(5 * len(losses), 3.2), squeeze=False)
    for axis, (stage, values) in zip(axes[0], losses.items(), strict=True):
        smooth = [sum(values[max(0, i - 19) : i + 1]) / len(values[max(0, i - 19) : i + 1]) for i in range(len(values))]
        axis.plot(values, alpha=0.3)
        axis.plot(smooth, color="C0")
        axis.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_pictures(answers: list[dict], path: Path) -> None:
    """A random 5 x 4 sheet of `answers` (lines of answers.jsonl); titles of what is wrong are red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    chosen = random.Random(0).sample(answers, min(ROWS * COLUMNS, len(answers)))
    figure, axes = pyplot.subplots(ROWS, COLUMNS, figsize=(4 * COLUMNS, 4.4 * ROWS))
    for axis in axes.flat:
        axis.axis("off")
    for axis, said in zip(axes.flat, chosen, strict=False):
        axis.imshow(Image.open(io.BytesIO(base64.b64decode(said["picture"]))))
        verdict = "right" if said["is_right"] else "WRONG: " + (", ".join(said["wrong"]) or "too much said")
        lines = textwrap.wrap(said["description"], 52)[:6]
        mark, colour = ("right", "green") if said["answer_is_right"] else ("WRONG", "red")
        axis.text(0, 1.02, "\n".join(lines), transform=axis.transAxes, va="bottom", fontsize=7.5)
        axis.set_title(verdict, color="green" if said["is_right"] else "red", fontsize=10, pad=12 * len(lines))
        answer = textwrap.shorten(f"{said['question']} {said['answer']}", 75)
        axis.text(0, -0.02, f"{answer} ({mark})", transform=axis.transAxes, va="top", fontsize=7.5, color=colour)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)
