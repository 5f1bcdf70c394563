"""Losses are read when a progress line is due, checked, averaged, and written as numbers."""

import json
import logging
import resource

import pytest
import torch

from minigpt4.common.logger import (
    MetricLogger,
    NonFiniteLossError,
    RunLog,
    setup_logger,
    short_number,
    whole_seconds,
)

# reading a loss from that device is slow, so the logger waits until a progress line is due
NOT_THE_CPU = torch.device("meta")


def epoch_of(
    losses, run_log, device=NOT_THE_CPU, epoch=2, log_freq=4, samples_seen=100, max_skipped=1
):
    """Yield the logger of an epoch after each of its steps."""
    metrics = MetricLogger(epoch, len(losses), log_freq, device, run_log, samples_seen, max_skipped)
    for loss in losses:
        with metrics.fetching():
            batch = {"image": torch.zeros(3, 1), "sample_id": ["a", "b", "c"]}
        metrics.add(torch.tensor(loss), 0.5, batch)
        metrics.updated(~torch.tensor(loss).isfinite())
        metrics.check()
        metrics.end_step()
        yield metrics


def written(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_losses_stay_unread_until_a_line_is_due(tmp_path):
    steps = epoch_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], RunLog(tmp_path))
    assert [len(next(steps).losses) for _ in range(6)] == [1, 1, 1, 1, 5, 6]
    assert [record["loss"] for record in written(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [record["step"] for record in written(tmp_path)] == list(range(12, 18))
    assert written(tmp_path)[-1]["samples"] == 118


def test_samples_are_counted_over_ranks_with_batches_of_their_own_size(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "minigpt4.common.logger.sum_over_ranks", lambda counts, device: [3 * n for n in counts]
    )
    *_, metrics = epoch_of([1.0, 2.0], RunLog(tmp_path))
    counts = [(record["batch_samples"], record["samples"]) for record in written(tmp_path)]
    assert counts == [(9, 109), (9, 118)] and metrics.state()["samples_seen"] == 118


def test_on_the_cpu_every_step_is_written_at_once(tmp_path):
    for count, _ in enumerate(
        epoch_of([1.0, 2.0, 3.0], RunLog(tmp_path), torch.device("cpu")), start=1
    ):
        assert len(written(tmp_path)) == count


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named_where_it_arose(tmp_path, value):
    with pytest.raises(NonFiniteLossError) as caught:
        list(epoch_of([1.0, value, 3.0, 4.0, 5.0], RunLog(tmp_path)))
    message = str(caught.value)
    assert message.startswith(
        f"step 11: loss is {value} on rank 0 (samples a, b, c); optimizer not stepped; 1 in a row"
    )


def test_only_skipped_updates_in_a_row_end_the_run(tmp_path, capsys):
    nan = float("nan")
    *_, metrics = epoch_of([1.0, nan, 3.0, nan, nan, 6.0], RunLog(tmp_path), max_skipped=3)
    assert "step 16: update skipped on all ranks, 2 in a row, 3 so far" in capsys.readouterr().out
    assert [record["loss"] for record in written(tmp_path)] == [1.0, None, 3.0, None, None, 6.0]
    assert metrics.end_epoch()["loss"] == 10 / 3
    with pytest.raises(NonFiniteLossError, match="not stepped; 3 in a row"):
        list(epoch_of([1.0, nan, nan, nan, 5.0], RunLog(tmp_path), max_skipped=3))


def test_means_over_the_epoch(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        *_, metrics = epoch_of([1.0, 2.0, 6.0], RunLog(tmp_path))
        assert metrics.end_epoch() == {"lr": 0.5, "loss": 3.0}
    assert caplog.messages == ["Averaged stats: lr: 0.5000  loss: 3.0000"]


def test_waiting_for_data_is_counted_as_such(tmp_path):
    metrics = MetricLogger(0, 1, 1, torch.device("cpu"), RunLog(tmp_path))
    with metrics.fetching():
        torch.randn(400, 400) @ torch.randn(400, 400)
    metrics.add(torch.tensor(1.0), 0.5, {"image": torch.zeros(3, 1)})
    metrics.check()
    metrics.end_step()
    (record,) = written(tmp_path)
    assert 0 < record["data_seconds"] < record["seconds"]


def test_log_txt_holds_the_configuration_then_lines(tmp_path):
    run_log = RunLog(tmp_path)
    run_log.config({"run": {"init_lr": 1e-4, "text": "ü"}})
    run_log.epoch({"train_lr": 9.5e-05, "train_loss": 3.21})
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith('{\n    "run": {\n        "init_lr": 0.0001,')
    assert text.endswith('}\n{"train_lr": 9.5e-05, "train_loss": 3.21}\n')


def test_a_lost_folder_costs_one_warning(tmp_path, caplog):
    run_log = RunLog(tmp_path / "gone")
    run_log.epoch({"train_loss": 1.0})
    run_log.epoch({"train_loss": 2.0})
    assert caplog.text.count("training goes on without it") == 1


def test_durations_and_the_log_format(capsys):
    assert [whole_seconds(seconds) for seconds in (0.9, 61.2, 3 * 3600 + 4)] == [
        "0:00:00",
        "0:01:01",
        "3:00:04",
    ]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        setup_logger()
        logging.info("Start training")
        assert capsys.readouterr().err.rstrip().endswith("[INFO] Start training")
    finally:
        root.handlers[:], root.level = handlers, level


def test_what_is_no_number_is_null(tmp_path):
    """JSON has no nan."""
    run_log, stats = RunLog(tmp_path), {"train_lr": 0.5, "train_loss": float("nan")}
    run_log.epoch({"train_loss": 1.0})
    assert not run_log.has_epoch(stats)
    run_log.epoch(stats)
    run_log.steps([{"step": 3, "loss": float("inf")}])
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last == '{"train_lr": 0.5, "train_loss": null}' and run_log.has_epoch(stats)
    assert written(tmp_path) == [{"step": 3, "loss": None}]


@pytest.mark.parametrize("left", [1, 7, 40])
def test_a_disk_that_is_full_within_a_line_costs_lines_and_one_warning(tmp_path, caplog, left):
    run_log, stats = RunLog(tmp_path), {"train_loss": 0.25}
    run_log.epoch({"train_loss": 0.5})
    used, limits = (tmp_path / "log.txt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (used + left, limits[1]))
    try:
        run_log.config({"name": "ä" * 40})
        run_log.steps([{"step": 1, "loss": 0.5}] * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("training goes on without it") == 1
    with open(tmp_path / "log.txt", "ab") as file:
        file.write("ä".encode()[:1])  # half a character, written by another program
    assert not run_log.has_epoch(stats)
    run_log.epoch(stats)
    assert run_log.has_epoch(stats) and (tmp_path / "log.txt").read_bytes().endswith(
        b'\n{"train_loss": 0.25}\n'
    )


def test_throughput_over_the_window_is_of_all_samples_and_tokens(tmp_path, capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("minigpt4.common.logger.time.perf_counter", lambda: float(next(clock)))
    metrics = MetricLogger(0, 30, 10, torch.device("cpu"), RunLog(tmp_path))
    for step in range(30):
        with metrics.fetching():  # each reading of the clock is one second later
            pass
        metrics.add(
            torch.tensor(1.0),
            0.5,
            {"image": torch.zeros(2 + step % 2, 1)},
            num_tokens=3000 * (step % 2),
        )
        metrics.check()
        metrics.end_step()
    records = written(tmp_path)
    assert [
        records[-1][key] for key in ("seconds", "data_seconds", "batch_samples", "batch_tokens")
    ] == [2, 1, 3, 3000]
    # over the last 20 steps of 2 s each, without the time between steps: 10 x 2 and 10 x 3 samples, 10 x 3000 tokens
    rates = [records[-1][key] for key in ("samples_per_s", "tokens_per_s", "data_wait")]
    assert rates == [1.25, 750.0, 0.5]
    line = capsys.readouterr().out.splitlines()[-1]
    assert "  loss: 1.0000  time: 2.0000  data: 1.0000  max mem: " in line
    assert line.endswith("  1.2 samples/s  750 tok/s  wait 50%")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.523, "0.52"),
        (5.84, "5.8"),
        (9.96, "10"),
        (610.4, "610"),
        (9999.4, "9999"),
        (12345, "12.3k"),
    ],
)
def test_rates_in_three_digits(value, text):
    assert short_number(value) == text


def test_a_validation_is_a_line_of_its_own(tmp_path):
    run_log = RunLog(tmp_path)
    run_log.steps([{"step": 1, "loss": 0.5}])
    run_log.validation({"validation": "val", "step": 1, "loss": 0.75})
    assert written(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"validation": "val", "step": 1, "loss": 0.75},
    ]
