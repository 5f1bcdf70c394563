"""run_card.json and run_card.md: correct however a run ends, and never a cause of its failure."""

import json
import logging
import os
import platform
import signal
import sys

import pytest
import torch

from minigpt4.common.cli import Interrupted
from minigpt4.common.logger import NonFiniteLossError
from minigpt4.models.part_hashes import part_hashes, tensor_hashes
from minigpt4.runners import run_card
from minigpt4.runners.curves import read_metrics
from minigpt4.tasks import ImageTextPretrainTask
from tests.small_release import write_align_folder, write_shard
from tests.training import (
    Images,
    batches,
    dataset_sections,
    endless,
    runner,
    settings,
    tiny_model,
    trained,
)


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def card_of(run):
    return json.loads((run.output_dir / "run_card.json").read_text(), parse_constant=no_constant)


def text_of(run):
    return (run.output_dir / "run_card.md").read_text()


def doing(action, at, fixed=None):
    """Yield endless batches; call `action` before batch number `at`."""
    for number, batch in enumerate(endless(fixed or batches())):
        if number == at:
            action()
        yield batch


def test_a_finished_run(tmp_path):
    run = trained(tmp_path)
    card, steps = card_of(run), read_metrics(run.output_dir).steps
    assert (card["outcome"], card["run"]) == ("finished", run.output_dir.name)
    assert card["curve"]["steps"] == 12 and card["curve"]["first"] == [0, steps[0]["loss"]]
    assert card["curve"]["lowest"][1] == min(record["loss"] for record in steps)
    assert card["result"]["final_loss"]["mean"] == pytest.approx(
        sum(record["loss"] for record in steps) / 12
    )
    assert card["result"]["samples_seen"] == 48
    assert card["result"]["checkpoint"] == str(run.output_dir / "checkpoint_1.pth")
    saved = torch.load(run.output_dir / "checkpoint_1.pth", weights_only=True)["model"]
    assert card["result"]["trained_sha256"] == part_hashes(tensor_hashes(saved))
    frozen = card["model"]["frozen_sha256"]
    assert frozen.keys() == {"visual_encoder"} and frozen["visual_encoder"]["unchanged"]
    (process,) = card["processes"]
    assert (process["steps"], process["ranks"], process["versions"]["python"]) == (
        [0, 11],
        1,
        platform.python_version(),
    )
    assert process["hardware"]["cores"] == os.cpu_count() and process["peak_memory_mib"] > 1
    text = text_of(run)
    assert (
        "![Loss and learning rate](loss.png)" in text
        and "## Recipe" in text
        and "`, unchanged |" in text
    )


def test_the_curve_has_about_fifty_points_which_are_means():
    steps = [{"step": number, "loss": float(number)} for number in range(120)]
    points = run_card.curve(steps)["points"]
    assert points[:2] == [[2, 1.0], [5, 4.0]] and len(points) == 40


@pytest.mark.parametrize("name", ["weight", "scale"])
def test_a_frozen_weight_that_changes_in_training_is_found(tmp_path, caplog, name):
    model = tiny_model()
    tensor = getattr(model.visual_encoder, name)

    def touch():
        last = tensor.data.view(-1)[-1:]
        last.copy_(torch.nextafter(last, torch.tensor(9.0)))  # the smallest possible change

    run = runner(settings(tmp_path), model)
    run.train(doing(touch, at=5))
    card = card_of(run)
    assert card["model"]["changed_tensors"] == [f"visual_encoder.{name}"]
    assert not card["model"]["frozen_sha256"]["visual_encoder"]["unchanged"]
    assert (
        f"frozen weights are not what they were before training: visual_encoder.{name}"
        in caplog.text
    )
    assert "**changed** from `" in text_of(run)


def test_hashes_tell_types_shapes_and_places_apart():
    values = torch.arange(6, dtype=torch.float32)
    others = [
        values.reshape(2, 3),
        values.double(),
        values.flip(0),
        values.bfloat16(),
        values[:0],
        values[0],
        values > 1,
    ]
    hashes = tensor_hashes(dict(enumerate([values, *others])))
    assert len(set(hashes.values())) == 8
    # the memory layout does not count
    assert tensor_hashes({"a": values.reshape(2, 3).T.contiguous().T})["a"] == hashes[1]


def test_interrupted_and_resumed_it_is_one_run(tmp_path):
    fixed = batches()
    run = runner(settings(tmp_path, resume_ckpt_path="auto"))
    with pytest.raises(Interrupted):
        run.train(doing(lambda: os.kill(os.getpid(), signal.SIGTERM), at=4, fixed=fixed))
    card = card_of(run)
    assert card["outcome"].startswith(
        "interrupted: ended by SIGTERM before epoch 0, step 5: saved "
    )
    assert card["processes"][0]["steps"] == [0, 4] and (run.output_dir / "loss.png").exists()
    rest = runner(settings(tmp_path, resume_ckpt_path="auto"))
    rest.train(endless(fixed, start=5))
    more = card_of(rest)
    assert rest.output_dir == run.output_dir and more["outcome"] == "finished"
    assert [process["steps"] for process in more["processes"]] == [[0, 4], [5, 11]]
    assert more["curve"]["steps"] == 12 and more["result"]["samples_seen"] == 48
    # the end is compared with the frozen weights of the very beginning
    before = card["model"]["frozen_sha256"]["visual_encoder"]["before"]
    assert more["model"]["frozen_sha256"]["visual_encoder"]["before"] == before


def test_a_run_that_was_killed_after_its_last_step_gets_its_card(tmp_path):
    """Interrupted in its last validation; and killed before it wrote a card."""
    fixed = batches()
    changes = {"resume_ckpt_path": "auto", "valid_splits": ["val"], "batch_size_eval": 2}

    def new_runner():
        datasets = {"images": {"val": Images(fixed[0]["image"])}}
        return runner(settings(tmp_path, **changes), datasets=datasets)

    run, passes = new_runner(), iter(range(100))
    forward = run.model.forward

    def signalled(samples):
        # of two batches a validation
        if not run.model.training and next(passes) == 2:
            run.interruption.signal = signal.SIGTERM
        return forward(samples)

    run.model.forward = signalled
    with pytest.raises(Interrupted, match="before epoch 2, step 0"):
        run.train(endless(fixed))
    assert len(card_of(run)["validation"]) == 1
    new_runner().train(endless(fixed))
    card = card_of(run)
    assert card["outcome"] == "finished" and len(card["validation"]) == 2
    assert card["model"]["frozen_sha256"]["visual_encoder"]["unchanged"]
    assert [process["steps"] for process in card["processes"]] == [[0, 11], None]
    # the card of a finished run stays
    new_runner().train(endless(fixed))
    assert card_of(run) == card
    for name in ("run_card.json", "run_card.md", "loss.png"):
        (run.output_dir / name).unlink()
    new_runner().train(endless(fixed))
    assert card_of(run)["outcome"] == "finished" and (run.output_dir / "loss.png").exists()


def test_steps_that_a_killed_process_had_trained_further_do_not_count(tmp_path):
    changes = {"iters_per_epoch": 12, "save_every_iters": 4, "resume_ckpt_path": "auto"}

    def fail():
        raise RuntimeError

    run = runner(settings(tmp_path, **changes))
    with pytest.raises(RuntimeError):
        run.train(doing(fail, at=9))
    (run.output_dir / "checkpoint_0_iter_8.pth").unlink()
    with pytest.raises(Interrupted, match="before epoch 0, step 6"):
        runner(settings(tmp_path, **changes)).train(
            doing(lambda: os.kill(os.getpid(), signal.SIGTERM), at=1)
        )
    card = card_of(run)
    assert card["processes"][-1]["steps"] == [4, 5] and card["curve"]["last"][0] == 5
    assert (card["curve"]["steps"], card["result"]["samples_seen"]) == (6, 24)


def test_a_run_that_fails_has_a_card_in_strict_json(tmp_path):
    nan = [{**batch, "image": batch["image"] * float("nan")} for batch in batches()]
    run = runner(settings(tmp_path, max_skipped_updates=3))
    with pytest.raises(NonFiniteLossError):
        run.train(endless(batches()[:2] + nan))
    card = card_of(run)
    assert card["outcome"].startswith("failed: NonFiniteLossError: step 4: loss is nan")
    assert card["curve"]["last"][0] == 1 and card["result"]["checkpoint"] is None
    assert (run.output_dir / "loss.png").exists() and "failed: NonFiniteLossError" in text_of(run)


def test_what_cannot_be_written_costs_warnings_only(tmp_path, caplog):
    run = runner(settings(tmp_path))
    run.train(doing(lambda: (run.output_dir / "run_card.md").mkdir(), at=3))
    assert run.last_checkpoint.exists() and "run_card.md not written (" in caplog.text
    assert not list(run.output_dir.glob("*.partial"))


def test_an_error_in_the_card_costs_a_warning_only(tmp_path, caplog):
    model = tiny_model()
    run = runner(settings(tmp_path), model)
    run.train(doing(lambda: setattr(model, "parts", lambda: model.missing), at=3))
    assert run.last_checkpoint.exists()
    assert "run_card not written (AttributeError" in caplog.text


def test_a_card_that_cannot_be_read_is_written_anew(tmp_path):
    for content in (
        "",
        "[]",
        "{}",
        '{"model": 3, "processes": []}',
        '{"processes": [1]',
        '{"processes": null}',
    ):
        (tmp_path / "run_card.json").write_text(content)
        assert run_card.earlier_card(tmp_path) == {}


def test_datasets_samples_and_reasons(tmp_path):
    write_align_folder(tmp_path / "align", 10)
    (tmp_path / "align" / "image" / "3.jpg").write_bytes(b"no image")
    write_shard(tmp_path / "0.tar", range(12))
    cfg = settings(tmp_path / "out", iters_per_epoch=10, max_epoch=1, max_bad_fraction=0.5)
    storages = {"cc_sbu_align": tmp_path / "align", "laion": tmp_path / "0.tar"}
    cfg.datasets_cfg = dataset_sections(storages, "blip2_image_eval")
    run = runner(cfg, datasets=ImageTextPretrainTask().build_datasets(cfg))
    run.train()
    data = card_of(run)["data"]
    assert data["cc_sbu_align"]["records"] == 10 and data["laion"]["files"] == 1
    assert data["laion"]["sha"] == run.datasets["laion"]["train"].fingerprint
    assert data["laion"]["samples"] + data["cc_sbu_align"]["samples"] == 40
    met, skipped = data["cc_sbu_align"]["met"], data["cc_sbu_align"]["skipped"]
    assert (
        set(skipped) <= {"bad_image"}
        and met - sum(skipped.values()) == data["cc_sbu_align"]["samples"]
    )
    assert "| laion | " in text_of(run)


def test_validation_is_a_table(tmp_path):
    run = runner(settings(tmp_path))
    line = {
        "validation": "val",
        "step": 3,
        "epoch": 0,
        "loss": 1.5,
        "blank_loss": 2.5,
        "items": 7,
        "seconds": 2.0,
    }
    run.train(doing(lambda: run.log.validation(line), at=3))
    assert card_of(run)["validation"] == [line]
    assert card_of(run)["processes"][0]["seconds"]["of_it_validation"] == 2.0
    assert "| split | step | epoch | loss | blank image | items |" in text_of(run)
    assert "| val | 3 | 0 | 1.5000 | 2.5000 | 7 |" in text_of(run)


def test_samples_of_two_ranks(two_ranks, tmp_path):
    """Each rank draws samples of its own: the card of rank 0 counts those of both."""
    write_shard(tmp_path / "0.tar", range(12))

    def work(rank):
        cfg = settings(tmp_path / "out", iters_per_epoch=3, max_epoch=1)
        cfg.datasets_cfg = dataset_sections({"laion": tmp_path / "0.tar"}, "blip2_image_eval")
        runner(cfg, datasets=ImageTextPretrainTask().build_datasets(cfg)).train()

    code, *said = two_ranks(work)
    assert code == 0, said
    (path,) = (tmp_path / "out").glob("*/run_card.json")
    card = json.loads(path.read_text())
    assert card["data"]["laion"]["samples"] == card["result"]["samples_seen"] == 24
    assert card["processes"][0]["ranks"] == card["data"]["laion"]["counted_on_ranks"] == 2


def test_the_command_line_has_no_secrets(monkeypatch):
    address = "https://me:secret@data.example/0.tar?token=secret"
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--options", f"a.storage={address}", address, "b=two words"]
    )
    clean = "https://data.example/0.tar"
    assert run_card.command_line() == f"train.py --options a.storage={clean} {clean} 'b=two words'"


def test_the_end_is_said_without_a_word_of_the_card(tmp_path, caplog):
    """Writing the card adds nothing to the log of a successful run."""
    with caplog.at_level(logging.WARNING):
        trained(tmp_path)
    assert not caplog.records
