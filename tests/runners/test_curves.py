"""metrics.jsonl read back, and loss.png."""

import io
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

from minigpt4.common.logger import RunLog
from minigpt4.runners.curves import Metrics, _draw, draw_runs, read_metrics, smoothed
from tests.training import trained

BLUE, RED = (9, 105, 218), (207, 34, 46)  # training, the first validation split


def step(number, loss):
    return {"step": number, "epoch": 0, "lr": 0.1, "samples": 4 * number, "loss": loss}


def validation(number, split="val", **losses):
    return {"validation": split, "step": number, "epoch": 0, **losses}


def colours(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return image.size, {colour for _, colour in image.getcolors(2**24)}


def test_a_step_made_twice_counts_once_and_what_is_no_line_not_at_all(tmp_path):
    log = RunLog(tmp_path)
    log.steps([step(0, 3.0), step(1, 2.5), step(2, None)])
    log.validation(validation(1, loss=9.0))
    log.validation(validation(1, "test", loss=8.0))
    log.steps([step(1, 2.0)])  # the run resumed here
    log.validation(validation(1, loss=2.25, blank_loss=None))
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('[1]\n{"step": "x", "loss": 1}\n{"step": 5, "loss": 1, "lr"')
    metrics = read_metrics(tmp_path)
    assert [record["loss"] for record in metrics.steps] == [3.0, 2.0, None]
    assert [(record["validation"], record["loss"]) for record in metrics.validations] == [
        ("val", 2.25),
        ("test", 8.0),
    ]


def test_smoothing_by_hand():
    assert smoothed([4.0, 2.0, 0.0, 6.0], 2) == [4.0, 3.0, 1.0, 3.0]


def test_the_picture_shows_training_and_validation(tmp_path):
    log = RunLog(tmp_path)
    log.steps([step(number, 3.0 - number / 40) for number in range(80)])
    size, without = colours(draw_runs({"a run": read_metrics(tmp_path)}))
    assert size == (900, 450) and BLUE in without and RED not in without
    for number in (20, 60):
        log.validation(validation(number, loss=2.0, blank_loss=3.0, wrong_loss=None))
    metrics = read_metrics(tmp_path)
    assert RED in colours(draw_runs({"a run": metrics}))[1]
    assert colours(draw_runs({"one": metrics, "two": metrics}))[0][0] > 900


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([4.0, 2.0], (0, 4.2)),
        ([-4.0, -2.0], (-4.2, 0)),
        ([-4.0, 2.0], (-4.2, 2.1)),
        ([0.0], (0, 1)),
    ],
)
def test_the_loss_axis_holds_negative_losses_too(losses, expected):
    axis = Figure().subplots()
    _draw(axis, "a run", Metrics([step(*pair) for pair in enumerate(losses)], []))
    assert axis.get_ylim() == pytest.approx(expected)


def test_without_matplotlib_a_run_says_so_once(tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = trained(tmp_path)
    assert caplog.text.count("loss.png is not drawn") == 1
    assert not (run.output_dir / "loss.png").exists() and (run.output_dir / "run_card.md").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_one_point_is_no_curve(tmp_path, steps):
    run = trained(tmp_path, max_epoch=1, iters_per_epoch=steps)
    assert (run.output_dir / "loss.png").exists() == (steps == 2)
