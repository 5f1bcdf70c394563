"""Validation during training: each item once, controls, the best checkpoint, and no effect on the training."""

import json
import logging
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from minigpt4.common.cli import Interrupted
from minigpt4.datasets.datasets.base_dataset import Place
from minigpt4.datasets.datasets.dataloader_utils import EvalLoader
from minigpt4.datasets.datasets.image_controls import with_other_images
from minigpt4.datasets.datasets.map_style import adapted
from minigpt4.runners.run_folder import newest_checkpoint
from minigpt4.tasks import BaseTask, ImageTextPretrainTask
from minigpt4.tasks.held_out import LEAST_GAIN, HeldOut, held_out_losses
from tests.training import TinyModel, runner, settings, weights

NUM_ITEMS, CPU = 13, torch.device("cpu")
SHORT = {
    "iters_per_epoch": 7,
    "valid_splits": ["val"],
    "batch_size_eval": 4,
    "eval_every_iters": 3,
    "init_lr": 0.1,
}


class Sees(TinyModel):
    """Learns to predict, from the image, the number that each text begins with; a text has one target a word."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.llama_proj = nn.Linear(6, 1)
        self.num_forwards = self.interrupt_at = 0
        self.run = None

    def row_losses(self, samples):
        """Declare that `forward` can return the loss of each sample."""

    def forward(self, samples, reduction="mean"):
        if not self.training and self.interrupt_at:
            self.num_forwards += 1
            if self.num_forwards == self.interrupt_at:
                self.run.interruption.signal = signal.SIGTERM
        images = samples["image"].flatten(1)[:, :6]
        goals = torch.tensor([float(text.split()[0]) for text in samples["text_input"]])
        counts = torch.tensor([len(text.split()) for text in samples["text_input"]])
        sums = (self.llama_proj(self.dropout(images))[:, 0] - goals).square() * counts
        if reduction == "none":
            return {"loss": sums, "num_targets": counts}
        return {"loss": sums.sum() / counts.sum(), "num_targets": counts.sum()}


class Numbers(Dataset):
    """Images in equal pairs, each with the number that is in it or, if `swapped`, in another image."""

    def __init__(self, number=NUM_ITEMS, seed=0, swapped=False):
        images = torch.randn(
            -(-number // 2), 3, 2, 2, generator=torch.Generator().manual_seed(seed)
        )
        self.images = images.repeat_interleave(2, 0)[:number]
        self.goals = self.images.flatten(1)[:, :6].sum(1)
        if swapped:
            self.goals = self.goals[
                torch.randperm(number, generator=torch.Generator().manual_seed(seed))
            ]

    def vis_processor(self, image):
        return torch.zeros(3, 2, 2) + (image.getpixel((0, 0))[0] / 255 - 0.5)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        words = " ".join([f"{self.goals[index].item()}"] + ["word"] * (index % 3))
        return {"image": self.images[index], "text_input": words, "sample_id": str(index)}


def loaders_of(dataset, batch_size, rank=0, world_size=1):
    return [
        EvalLoader(
            adapted(dataset, "numbers"), Place(0, rank, world_size), batch_size, 0, 0.05, True
        )
    ]


def new_runner(folder, swapped=False, dropout=0.5, **changes):
    """Return a runner that trains and validates on Numbers, with a loader that can resume."""
    torch.manual_seed(0)
    datasets = {"numbers": {"train": adapted(Numbers(40, swapped=swapped), "numbers")}}
    datasets["numbers"]["val"] = adapted(Numbers(seed=1), "numbers val")
    run = runner(
        settings(folder, **{**SHORT, "resume_ckpt_path": "auto", **changes}),
        Sees(dropout=dropout),
        datasets,
    )
    run.model.run = run
    return run


def records_of(run):
    lines = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    found = [line for line in lines if "validation" in line]
    assert all(line.pop("seconds") > 0 for line in found)
    return found


# ---------------------------------------- the numbers


def by_hand(model, dataset):
    """Return the losses with right, blank and wrong images, and the samples' gains, computed by their definitions."""
    texts, counts = [dataset[index]["text_input"] for index in range(len(dataset))], []
    images, losses = dataset.images, {}
    # the nearest earlier sample with another image, with images in pairs one or two before; the last for the first ones
    wrong = [(index - 1 - index % 2) % NUM_ITEMS for index in range(NUM_ITEMS)]
    grey = torch.full_like(images, 128 / 255 - 0.5)
    for name, shown in (("right", images), ("blank", grey), ("wrong", images[wrong])):
        outputs = model({"image": shown, "text_input": texts}, reduction="none")
        losses[name], counts = outputs["loss"].double(), outputs["num_targets"]
    gains = (losses["wrong"] - losses["right"]) / counts
    return (
        {name: (sums.sum() / counts.sum()).item() for name, sums in losses.items()},
        gains,
        counts.sum().item(),
    )


@pytest.mark.parametrize("batch_size", [1, 4, 13])
@torch.no_grad()
def test_losses_and_controls_are_those_by_hand_whatever_the_batches(batch_size):
    torch.manual_seed(0)
    model, dataset = Sees().eval(), Numbers()
    expected, gains, num_targets = by_hand(model, dataset)
    found = held_out_losses(ImageTextPretrainTask(), model, loaders_of(dataset, batch_size), CPU)
    # float32 products of other shapes round differently
    assert (found.loss, found.blank_loss, found.wrong_loss) == pytest.approx(
        tuple(expected.values()), rel=1e-5
    )
    assert (found.num_items, found.num_samples, found.num_pairs) == (
        num_targets,
        NUM_ITEMS,
        NUM_ITEMS,
    )
    assert found.gain == pytest.approx(gains.mean().item(), rel=1e-4)
    assert found.error == pytest.approx((gains.std() / NUM_ITEMS**0.5).item(), rel=1e-4)


def test_thirteen_items_over_two_ranks_are_thirteen(two_ranks, tmp_path):
    def work(rank):
        torch.manual_seed(0)
        found = held_out_losses(
            ImageTextPretrainTask(), Sees(), loaders_of(Numbers(), 4, rank, 2), CPU
        )
        (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    code, *said = two_ranks(work)
    assert code == 0, said
    torch.manual_seed(0)
    alone = held_out_losses(ImageTextPretrainTask(), Sees(), loaders_of(Numbers(), 4), CPU)
    found = HeldOut(*json.loads((tmp_path / "0.json").read_text()))
    assert found == pytest.approx(alone, rel=1e-5)
    assert (found.num_samples, found.num_items) == (13, alone.num_items)


@pytest.mark.parametrize(
    ("gain", "error", "verdict"),
    [
        (0.5, 0.1, True),
        (0.15, 0.1, False),
        (LEAST_GAIN * 1.9, 1e-6, False),
        (0.1, None, None),
        (-0.5, 0.1, False),
    ],
)
def test_what_clearly_better_is(gain, error, verdict):
    assert HeldOut(2.0, gain=gain, error=error, num_pairs=10).uses_image is verdict


class Mixed(Dataset):
    """Samples of no, one and two images: those without have nothing to exchange, that of two no other of its size."""

    sizes = (0, 1, 1, 0, 2, 1)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        images = [torch.full((3, 2, 2), index + number / 10) for number in range(self.sizes[index])]
        return {"images": images, "text_input": "1", "sample_id": str(index)}


def test_only_as_many_images_of_another_sample_take_the_place_of_its_own():
    dataset = with_other_images(adapted(Mixed(), "mixed"))
    others = [
        [image[0, 0, 0].item() for image in dataset[index].get("other_images", ())]
        for index in range(6)
    ]
    assert others == [[], [5.0], [1.0], [], [], [2.0]]


def test_a_stream_gives_the_images_of_the_sample_before_that_has_others():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter({"image": torch.full((3, 1, 1), float(value))} for value in (1, 1, 2, 2, 3))

    others = [sample.get("other_images", [None])[0] for sample in with_other_images(Stream())]
    assert others[:2] == [None, None] and [int(other[0]) for other in others[2:]] == [1, 1, 2]


def test_models_and_tasks_without_losses_of_samples_have_no_control():
    class Own(BaseTask):
        def train_step(self, model, samples):
            return model(samples)["loss"] * 2

    class Evaluates(BaseTask):
        def evaluation(self, model, loaders, device):
            return 0.25

    torch.manual_seed(0)
    model, loaders = Sees(), loaders_of(Numbers(), 1)
    whole = held_out_losses(BaseTask(), model, loaders, CPU)
    own = Own().held_out(model, loaders, CPU, lambda: False)
    assert whole.wrong_loss is not None and own.wrong_loss is own.gain is own.uses_image is None
    assert own.num_items == NUM_ITEMS  # one mean a sample, over its words
    assert Evaluates().held_out(model, loaders, CPU, lambda: False) == HeldOut(0.25)


# ---------------------------------------- in a run


def test_validation_within_epochs_changes_nothing_and_is_the_same_when_cut(tmp_path, caplog):
    plain = new_runner(tmp_path / "plain", valid_splits=[], eval_every_iters=None)
    plain.train()
    whole = new_runner(tmp_path / "whole", save_every_iters=2)
    whole.train()
    assert torch.equal(weights(plain), weights(whole))
    records = records_of(whole)
    assert [(line["step"], line["epoch"]) for line in records] == [
        (3, 0),
        (6, 0),
        (7, 0),
        (10, 1),
        (13, 1),
        (14, 1),
    ]
    assert records[-1]["loss"] < records[0]["loss"] and {line["samples"] for line in records} == {
        NUM_ITEMS
    }
    last = json.loads((whole.output_dir / "log.txt").read_text().splitlines()[-1])
    assert list(last) == ["train_lr", "train_loss", "val_loss", "val_blank_loss", "val_wrong_loss"]
    assert last["val_loss"] == records[-1]["loss"]

    # killed at different forward passes of a validation, which has 12; the last time after a checkpoint
    for number in (5, 20, 26):
        cut = new_runner(tmp_path / "cut", save_every_iters=2)
        cut.model.forward = killed_at(cut.model, number)
        with pytest.raises(KeyboardInterrupt):
            cut.train()
    cut = new_runner(tmp_path / "cut", save_every_iters=2)
    cut.train()
    assert torch.equal(weights(whole), weights(cut))
    assert records_of(cut) == records
    best = [
        torch.load(run.output_dir / "checkpoint_best.pth", weights_only=True)
        for run in (whole, cut)
    ]
    assert torch.equal(best[0]["model"]["llama_proj.weight"], best[1]["model"]["llama_proj.weight"])
    assert best[0]["progress"]["best"] == best[1]["progress"]["best"]
    # nothing is left to do, and nothing is repeated
    again = new_runner(tmp_path / "cut", save_every_iters=2)
    assert again.train() is None and records_of(cut) == records


def killed_at(model, number):
    """Return a `forward` of the model that, like a kill, ends the run at its `number`-th evaluation pass."""
    forward, passes = model.forward, iter(range(1, 10_000))

    def counted(*args, **kwargs):
        if not model.training and next(passes) == number:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    return counted


def acting_at(model, step, action):
    """Return a `forward` of the model that first calls `action` in training step `step` of this process."""
    forward, steps = model.forward, iter(range(10_000))

    def counted(*args, **kwargs):
        if model.training and next(steps) == step:
            action()
        return forward(*args, **kwargs)

    return counted


def kill():
    raise KeyboardInterrupt


def cut_before(run, step):
    """Train `step` steps, and end there like a kill."""
    run.model.forward = acting_at(run.model, step, kill)
    with pytest.raises(KeyboardInterrupt):
        run.train()


def test_what_a_killed_run_measured_after_its_checkpoint_is_measured_again(tmp_path):
    """The resumed run may get there with other rates, here by more epochs."""
    changes = {"iters_per_epoch": 20, "save_every_iters": 4, "eval_every_iters": 6}
    cut = new_runner(tmp_path / "cut", max_epoch=1, **changes)
    cut_before(cut, 7)
    changes |= {"max_epoch": 5}
    path = str(cut.output_dir / "checkpoint_0_iter_4.pth")
    elsewhere = new_runner(tmp_path / "other", resume_ckpt_path=path, **changes)
    resumed = new_runner(tmp_path / "cut", **changes)
    for run in (elsewhere, resumed):
        cut_before(run, 5)
    assert resumed.output_dir == cut.output_dir and records_of(elsewhere)[0]["step"] == 6
    assert records_of(resumed)[1:] == records_of(elsewhere) != records_of(resumed)[:1]


@pytest.mark.parametrize("changes", [{}, {"eval_controls": False}], ids=["same", "other settings"])
def test_a_validation_at_the_checkpoint_is_taken_over_if_its_settings_are_the_same(
    tmp_path, changes
):
    cut = new_runner(tmp_path, save_every_iters=3)
    cut_before(cut, 3)
    new_runner(tmp_path, save_every_iters=3, max_epoch=1, **changes).train()
    records = records_of(cut)
    assert [line["step"] for line in records] == [3] * len(changes) + [3, 6, 7]
    assert (records[-3]["wrong_loss"] is None) is bool(changes)


def test_a_best_checkpoint_that_cannot_be_written_is_not_the_best(tmp_path):
    run = new_runner(tmp_path, max_epoch=1)

    def stand_in_the_way():  # of the file that is written first
        (run.output_dir / f"checkpoint_best.pth.{os.getpid()}.partial").mkdir()

    run.model.forward = acting_at(run.model, 4, stand_in_the_way)
    run.train()
    losses = {line["step"]: line["loss"] for line in records_of(run)}
    assert losses[6] < losses[3]
    saved = torch.load(run.output_dir / "checkpoint_best.pth", weights_only=True)["progress"]
    assert run.validation.best == saved["best"] and saved["best"]["step"] == 3


@pytest.mark.parametrize("number", [2, 26], ids=["within an epoch", "at its end"])
def test_a_signal_within_a_validation_saves_at_once_and_the_resumed_run_validates(tmp_path, number):
    run = new_runner(tmp_path / "out")
    run.model.interrupt_at = number
    with pytest.raises(Interrupted, match=r"saved .*checkpoint_0.*pth"):
        run.train()
    assert [line["step"] for line in records_of(run)] == [3, 6][: number // 12]
    resumed = new_runner(tmp_path / "out")
    resumed.train()
    whole = new_runner(tmp_path / "whole")
    whole.train()
    assert records_of(resumed) == records_of(whole) and torch.equal(
        weights(resumed), weights(whole)
    )


def test_two_ranks_validate_together_and_end_together(two_ranks, tmp_path):
    def work(rank):
        run = new_runner(tmp_path / "out")
        # 6 passes a validation: rank 1 gets a signal within its second one
        run.model.interrupt_at = 8 * rank
        with pytest.raises(
            Interrupted, match=r"before epoch 0, step 6: saved .*checkpoint_0_iter_6.pth"
        ):
            run.train()
        resumed = new_runner(tmp_path / "out")
        resumed.train()
        (tmp_path / f"{rank}.json").write_text(
            json.dumps([*weights(resumed).tolist(), resumed.validation.best])
        )
        if rank == 0:
            assert [line["step"] for line in records_of(resumed)] == [3, 6, 7, 10, 13, 14]
            assert {line["samples"] for line in records_of(resumed)} == {NUM_ITEMS}

    code, *said = two_ranks(work)
    assert code == 0, said
    assert json.loads((tmp_path / "0.json").read_text()) == json.loads(
        (tmp_path / "1.json").read_text()
    )


def test_the_best_step_is_kept_through_pruning_and_resume(tmp_path):
    """With swapped numbers in training the held-out loss gets worse, so the first validation stays the best."""
    changes = {"swapped": True, "save_every_iters": 1, "init_lr": 0.4, "eval_every_iters": 1}
    whole = new_runner(tmp_path / "whole", **changes)
    whole.train()
    losses = {line["step"]: line["loss"] for line in records_of(whole)}
    step = min(losses, key=losses.get)
    saved = torch.load(whole.output_dir / "checkpoint_best.pth", weights_only=True)["progress"]
    assert (
        saved["best"] == {"metric": "val_loss", "value": losses[step], "step": step} and step < 10
    )
    assert saved["position"] == dict(zip(("epoch", "step"), divmod(step, 7), strict=True))
    assert not (whole.output_dir / f"checkpoint_0_iter_{step}.pth").exists()
    assert newest_checkpoint(tmp_path / "whole").name == "checkpoint_1.pth"
    # a later checkpoint has it in its progress, and resumes into a folder without that file
    later = whole.output_dir / "checkpoint_1_iter_5.pth"
    rest = new_runner(tmp_path / "rest", **changes | {"resume_ckpt_path": str(later)})
    rest.train()
    assert (
        rest.validation.best["step"] == step
        and not (rest.output_dir / "checkpoint_best.pth").exists()
    )
    assert torch.equal(weights(rest), weights(whole))
    # and the best checkpoint can be resumed like any other
    path = str(whole.output_dir / "checkpoint_best.pth")
    from_best = new_runner(tmp_path / "best", **changes | {"resume_ckpt_path": path})
    from_best.train()
    assert torch.equal(weights(from_best), weights(whole))
    assert records_of(from_best) == [line for line in records_of(whole) if line["step"] >= step]


def test_another_metric_may_say_what_is_best(tmp_path):
    run = new_runner(tmp_path, best_metric="val_wrong_gap")
    run.train()
    gaps = {line["step"]: line["wrong_loss"] - line["loss"] for line in records_of(run)}
    assert run.validation.best["step"] == max(gaps, key=gaps.get)


@pytest.mark.parametrize(
    "swapped", [False, True], ids=["images and texts belong together", "swapped at random"]
)
def test_the_log_says_whether_the_model_uses_its_images(tmp_path, swapped, caplog):
    changes = {"iters_per_epoch": 120, "max_epoch": 1, "eval_every_iters": None, "dropout": 0.0}
    run = new_runner(tmp_path, swapped, **changes)
    with caplog.at_level(logging.INFO):
        run.train()
    (record,) = records_of(run)
    assert ("val: the model does not use the image: per token" in caplog.text) is swapped
    assert record["uses_image"] is not swapped
    figures = record["loss"], record["blank_loss"], record["wrong_loss"]
    shown = "Evaluation on val: loss %.4f, with blank images %.4f, with wrong images %.4f"
    assert shown % figures in caplog.messages
    if not swapped:  # learnt: the losses are squared errors of numbers whose variance is 6
        assert figures[0] < 0.1 and min(figures[1:]) > 1


def test_accumulated_updates_are_validated_at_the_first_one_behind_each_multiple(tmp_path):
    run = new_runner(tmp_path, accum_grad_iters=2, eval_every_iters=3, max_epoch=1)
    run.train()
    assert [line["step"] for line in records_of(run)] == [4, 6, 7]


def test_run_evaluate_has_the_controls_too(tmp_path):
    done = new_runner(tmp_path / "done")
    done.train()
    changes = {"evaluate": True, "resume_ckpt_path": str(done.last_checkpoint)}
    losses = new_runner(tmp_path / "evaluated", **changes).train()
    record = records_of(done)[-1]
    names = ("loss", "blank_loss", "wrong_loss")
    assert losses == {f"val_{name}": record[name] for name in names}
