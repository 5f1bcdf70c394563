"""run.report_to: what trackers receive, and that none of them can harm a training."""

import importlib.util
import json
import logging
import re
import signal
import sys
import threading
import types

import pytest
import torch

from minigpt4.common.cli import Interrupted
from minigpt4.common.versions import is_installed
from minigpt4.runners import RunnerBase, trackers
from minigpt4.runners.run_config import find_problems
from minigpt4.runners.trackers import Trackers, find_tracker_problems, tracker_names
from tests.training import Images, batches, endless, runner, settings, trained, weights


class Recorder:
    """A fake tracker that records its calls; `fails` names the calls that raise, `hangs` those that block."""

    def __init__(self, fails="", hangs=""):
        self.fails, self.hangs, self.released = fails, hangs, threading.Event()
        self.opened, self.config, self.logged, self.finished = [], {}, [], 0

    def open(self, folder, run_id):
        self.opened.append(run_id)
        self.happens("open")
        return self, run_id or "a new id"

    def happens(self, call):
        if call == self.hangs:
            self.released.wait(60)
        if call == self.fails:
            raise ConnectionError("no route to the server\nand more")

    def store_init_configuration(self, values):
        self.config |= values

    def log(self, values, step):
        self.happens("log")
        self.logged.append((step, values))

    def finish(self):
        self.happens("finish")
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    """Return a function that registers a Recorder as the tracker "recorder"."""

    def make(**kwargs):
        found = Recorder(**kwargs)
        monkeypatch.setitem(trackers.OPENERS, "recorder", found.open)
        monkeypatch.setitem(sys.modules, "recorder", types.ModuleType("recorder"))
        monkeypatch.setattr(trackers, "START_S", 0.2 if found.hangs == "open" else 60)
        monkeypatch.setattr(trackers, "CLOSE_S", 0.2 if found.hangs else 60)
        made.append(found)
        return found

    made = []
    yield make
    for found in made:
        found.released.set()


def test_a_tracker_gets_the_configuration_the_steps_and_the_validations(tmp_path, recorder):
    told = recorder()
    run = runner(settings(tmp_path, report_to=["recorder"]))

    def data():
        for number, batch in enumerate(endless(batches())):
            if number == 3:
                run.log.validation(
                    {"validation": "val", "step": 3, "epoch": 0, "loss": 1.5, "blank_loss": None}
                )
            yield batch

    run.train(data())
    assert told.config["run.init_lr"] == 0.05 and told.config["run.report_to"] == "['recorder']"
    lines = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step for step, _ in told.logged] == [line["step"] for line in lines] and len(
        lines
    ) == 13
    assert (
        told.logged[0][1]["train/loss"] == lines[0]["loss"]
        and told.logged[0][1]["train/lr"] == lines[0]["lr"]
    )
    assert told.logged[3] == (3, {"val/loss": 1.5, "val/epoch": 0})
    assert told.finished == 1


def test_a_resumed_run_continues_its_tracker(tmp_path, recorder):
    told, fixed = recorder(), batches()
    trained(tmp_path, fixed, max_epoch=1, report_to="recorder")
    trained(tmp_path, fixed, start=6, max_epoch=2, report_to="recorder", resume_ckpt_path="auto")
    assert told.opened == [None, "a new id"]
    assert [step for step, _ in told.logged] == list(range(12)) and told.finished == 2


def validated(tmp_path, **changes):
    """Return a runner with two batches of held-out images that reports to the recorder."""
    changes |= {"valid_splits": ["val"], "batch_size_eval": 2, "report_to": "recorder"}
    datasets = {"images": {"val": Images(batches()[0]["image"])}}
    return runner(settings(tmp_path, **changes), datasets=datasets)


def test_a_validation_made_up_for_after_the_last_step_is_sent(tmp_path, recorder):
    told, run = recorder(), validated(tmp_path, max_epoch=1)
    measure = run.task.held_out

    def signalled(*args):
        run.interruption.signal = signal.SIGTERM
        return measure(*args)

    run.task.held_out = signalled
    with pytest.raises(Interrupted):
        run.train(endless(batches()))
    validated(tmp_path, max_epoch=1, resume_ckpt_path="auto").train(endless(batches()))
    assert "val/loss" in told.logged[-1][1] and told.finished == 2


def test_a_validation_comes_after_the_steps_before_it(tmp_path, recorder):
    """On a GPU their losses are read later."""

    class OnADevice(RunnerBase):
        def _metrics(self, *args):
            metrics = super()._metrics(*args)
            metrics.device = torch.device("meta")
            return metrics

    told, cfg = recorder(), validated(tmp_path, eval_every_iters=4, max_epoch=1).config
    datasets = {"images": {"val": Images(batches()[0]["image"])}}
    runner(cfg, datasets=datasets, kind=OnADevice).train(endless(batches()))
    steps = [step + ("val/loss" not in values) for step, values in told.logged]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 6]


def test_an_evaluation_reports_to_no_tracker(tmp_path, recorder):
    told = recorder()
    assert validated(tmp_path, evaluate=True).train() and not told.opened


@pytest.mark.parametrize("kind", ["fails", "hangs"])
@pytest.mark.parametrize("call", ["open", "log", "finish"])
def test_one_that_fails_or_hangs_costs_a_warning(tmp_path, recorder, caplog, kind, call):
    recorder(**{kind: call})
    run = trained(tmp_path / "tracked", report_to="recorder")
    assert weights(run).equal(weights(trained(tmp_path / "alone")))
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    if kind == "fails":
        assert said == [
            f"recorder {'cannot start' if call == 'open' else 'failed'} (no route to the server); the run goes on "
            "without it"
        ]
    else:
        starting = ["recorder: no answer within 0 s; training begins without it"] * (call == "open")
        assert said == [*starting, "recorder: not all could be sent within 0 s; the rest is lost"]


def test_a_tracker_that_is_slow_loses_records_not_the_training(
    tmp_path, recorder, monkeypatch, caplog
):
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    told = recorder(hangs="log")
    tracking = Trackers(["recorder"], tmp_path, {})
    for number in range(20):
        tracking.log({"step": number, "loss": 1.0})
    assert caplog.text.count("slower than the training") == 1
    told.released.set()
    monkeypatch.setattr(trackers, "CLOSE_S", 60)
    tracking.close()
    assert told.finished == 1 and 1 <= len(told.logged) <= 4


def test_a_package_that_is_gone_at_the_start_costs_a_warning(
    tmp_path, recorder, monkeypatch, caplog
):
    recorder()
    monkeypatch.setitem(sys.modules, "recorder", None)
    trained(tmp_path, report_to="recorder")
    assert "recorder cannot be imported (" in caplog.text


def test_names(tmp_path):
    def names(**changes):
        return tracker_names(settings(tmp_path, **changes).run_cfg)

    assert names() == names(report_to=[]) == []
    assert names(report_to="wandb") == ["wandb"]
    assert names(report_to=["mlflow", "wandb", "mlflow"]) == ["mlflow", "wandb"]
    assert (
        names(report_to=["tensorboard"], tensorboard=True)
        == names(tensorboard=True)
        == ["tensorboard"]
    )


def test_problems_name_the_key_and_the_package(tmp_path, monkeypatch):
    def problems(**changes):
        return [
            str(problem) for problem in find_problems(settings(tmp_path, **changes).run_cfg, "run")
        ]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problems(report_to="wandb") == [
        "run.report_to: wandb needs the package wandb; pip install wandb"
    ]
    needs_board = (
        "run.tensorboard: tensorboard needs the package tensorboard; pip install tensorboard"
    )
    assert problems(tensorboard=True) == [needs_board]
    for wrong in ("wandbb", True, 3):
        assert problems(report_to=wrong) == [
            f"run.report_to: '{wrong}' is no tracker; give some of wandb, tensorboard, trackio, mlflow, or null"
        ]
    there = importlib.machinery.ModuleSpec("trackio", None, origin="trackio/__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    assert (
        find_tracker_problems(settings(tmp_path, report_to=["trackio", "mlflow"]).run_cfg, "run")
        == []
    )


def test_a_mere_folder_is_no_package(tmp_path, monkeypatch):
    """As ./wandb, which wandb writes to."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "only_a_folder").mkdir()
    assert importlib.util.find_spec("only_a_folder") and not is_installed("only_a_folder")
    assert is_installed("json") and not is_installed("no_such_package")


@pytest.mark.parametrize("name", trackers.OPENERS)
def test_the_real_one_without_network_and_login(name, tmp_path, monkeypatch, caplog):
    """Only with the tracker's package installed, which the project does not require."""
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "START_S", 300)
    monkeypatch.setattr(trackers, "CLOSE_S", 300)
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")
    for key in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    fixed = batches()
    run = trained(tmp_path / "output", fixed, max_epoch=1, report_to=name)
    trained(
        tmp_path / "output", fixed, start=6, max_epoch=2, report_to=name, resume_ckpt_path="auto"
    )
    warnings = [record.getMessage() for record in caplog.records if record.name == "root"]
    assert all(warning.startswith("wandb works offline") for warning in warnings)
    ids = json.loads((run.output_dir / "trackers.json").read_text())
    assert ids.keys() == {name}
    assert logged_losses(name, run.output_dir, ids[name]) == losses(run)


def losses(run):
    lines = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return pytest.approx({line["step"]: line["loss"] for line in lines})


def logged_losses(name, folder, run_id):
    """Return {step: train/loss} from the tracker's own reader."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(folder)).Reload()
        return {event.step: event.value for event in board.Scalars("train/loss")}
    if name == "mlflow":
        from mlflow import MlflowClient

        return {
            metric.step: metric.value
            for metric in MlflowClient().get_metric_history(run_id, "train/loss")
        }
    if name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(folder.parent.name, folder.name)
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    found = []  # in the files of both processes, as protobuf: the key, two bytes of tag, one of length, JSON
    for path in sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    ):
        found += re.findall(rb"train/loss\x82\x01.([\d.e-]+)", path.read_bytes(), flags=re.DOTALL)
    # each loss is there twice, in the history and in the summary
    return dict(enumerate(dict.fromkeys(map(float, found))))
