"""What a task defines: the loss of a batch and what evaluation is the mean over; and where a training loop belongs."""

import pytest
import torch
from torch.utils.data import Dataset

from minigpt4.runners import RunnerBase
from minigpt4.tasks import BaseTask, ImageTextPretrainTask
from tests.training import TinyModel, batches, found_by_two_ranks, runner, settings

WORDS = (1, 5, 2, 9, 3)  # target tokens of the samples


class CountsTargets(TinyModel):
    """A model whose loss is a mean over words, and which returns their number."""

    def forward(self, samples):
        image = samples["image"].flatten(1)
        words = torch.tensor([len(text.split()) for text in samples["text_input"]])
        each = (self.llama_proj(image) - image.mean(1, keepdim=True)).square().mean(1)
        return {"loss": (each * words).sum() / words.sum(), "num_targets": words.sum()}


class Samples(Dataset):
    """Samples of different lengths."""

    name = "samples"

    def __init__(self):
        self.images = batches(len(WORDS), 1, seed=1)[0]["image"]

    def __len__(self):
        return len(WORDS)

    def __getitem__(self, index):
        text = " ".join(["word"] * WORDS[index])
        return {"image": self.images[index], "text_input": text, "sample_id": str(index)}

    def bind(self, place, num_workers=0, max_bad_fraction=0.05):
        self.place = place


def loss_of(task, model, folder, size):
    """Return the evaluation loss on Samples, in batches of `size`."""
    cfg = settings(folder, batch_size_eval=size, seed=3)
    loaders = task.build_eval_loaders({"samples": {"val": Samples()}}, cfg.run_cfg, ["val"])
    return task.evaluation(model, loaders["val"], torch.device("cpu"))


@pytest.mark.parametrize("word", ["val", "eval", "valid", "validation"])
def test_all_names_of_the_validation_split_mean_the_same(word, tmp_path):
    cfg, task = settings(tmp_path, batch_size_eval=2), ImageTextPretrainTask()
    (loaders,) = task.build_eval_loaders(
        {"samples": {"val": Samples()}}, cfg.run_cfg, [word]
    ).values()
    assert sum(len(batch["text_input"]) for batch in loaders[0]) == len(WORDS)
    if word != "val":  # a dataset's own split of that name goes first
        with_both = {"samples": {"val": Samples(), word: (own := Samples())}}
        loaders = task.build_eval_loaders(with_both, cfg.run_cfg, [word])[word]
        assert loaders[0].source is own
    with pytest.raises(ValueError, match=f"no dataset has a split '{word}'"):
        task.build_eval_loaders({"samples": {"train": Samples()}}, cfg.run_cfg, [word])


def test_training_without_a_split_to_train_on_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"datasets: none has a split 'train' \(there are: samples: val\)"
    ):
        ImageTextPretrainTask().build_train_loader(
            {"samples": {"val": Samples()}}, settings(tmp_path).run_cfg
        )


def test_the_loss_is_a_mean_over_target_tokens_whatever_the_batches(tmp_path):
    torch.manual_seed(0)
    model, samples = CountsTargets(), Samples()
    images = samples.images
    with torch.no_grad():
        each = (model.llama_proj(images) - images.mean(1, keepdim=True)).square().mean(1)
    expected = (each * torch.tensor(WORDS)).sum().item() / sum(WORDS)
    assert abs(expected - each.mean().item()) > 1e-2
    for size in (1, 2, 5):  # float32 sums in another order
        assert loss_of(ImageTextPretrainTask(), model, tmp_path, size) == pytest.approx(
            expected, rel=1e-5
        )


def test_a_tasks_own_loss_is_evaluated_as_a_mean_over_samples(tmp_path):
    class Halved(BaseTask):
        def train_step(self, model, samples):
            return model(samples)["loss"] / 2

    torch.manual_seed(0)
    model, whole = CountsTargets(), Samples()
    with torch.no_grad():
        losses = [
            model({"image": whole[i]["image"][None], "text_input": ["a"]})["loss"]
            for i in range(len(WORDS))
        ]
    expected = sum(losses).item() / 2 / len(WORDS)
    assert loss_of(Halved(), model, tmp_path, 1) == pytest.approx(expected, rel=1e-5)


TWO_RANKS = """
import json, os, sys
import torch
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask
from tests.tasks.test_base_task import CountsTargets, loss_of
from tests.training import settings

root, rank = sys.argv[1], int(os.environ["RANK"])
cfg = settings(root)
cfg.pretty_print = lambda: None
with RunnerBase.launched(cfg):
    torch.manual_seed(0)
    model, seen = CountsTargets(), []
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0]["sample_id"]))
    loss = loss_of(ImageTextPretrainTask(), model, root, 2)
    torch.optim.AdamW(model.parameters())
threads = [open(f"/proc/self/task/{id}/comm").read() for id in os.listdir("/proc/self/task")]
found = {"loss": loss, "seen": seen, "left over": [name for name in threads if "gloo" in name]}
json.dump(found, open(f"{root}/found_{rank}.json", "w"))
"""


def test_two_ranks_evaluate_each_sample_once(tmp_path):
    first, second, _ = found_by_two_ranks(TWO_RANKS, tmp_path)
    assert (sorted(first["seen"]), sorted(second["seen"])) == (["0", "2", "4"], ["1", "3"])
    torch.manual_seed(0)
    alone = loss_of(ImageTextPretrainTask(), CountsTargets(), tmp_path, 5)
    assert first["loss"] == second["loss"] == pytest.approx(alone, rel=1e-5)
    # Threads that are still running can abort a process at its end.
    assert first["left over"] == second["left over"] == []


def test_a_split_without_a_usable_sample_is_an_error():
    with pytest.raises(ValueError, match=r"no sample of the split could be used, see above$"):
        ImageTextPretrainTask().evaluation(TinyModel(), [[]], torch.device("cpu"))


def test_a_training_loop_in_a_task_is_refused_with_advice():
    with pytest.raises(
        ValueError,
        match=r"Own has a training loop .* override train_step.* own train_epoch\(epoch, m",
    ):

        class Own(BaseTask):
            def train_epoch(self, epoch, model, data_loader, optimizer, lr_scheduler, **settings):
                """A task of the 2023 release could define this."""


def test_a_runner_may_have_a_training_loop_of_its_own(tmp_path):
    class Backwards(RunnerBase):
        def train_epoch(self, epoch, metrics):
            return (
                {"lr": 0.0, "loss": float(epoch)} if epoch else super().train_epoch(epoch, metrics)
            )

    run = runner(settings(tmp_path, max_epoch=2), kind=Backwards)
    run.train(iter(batches(number=6)))  # six batches: the second epoch takes none
    assert (
        (run.output_dir / "log.txt")
        .read_text()
        .endswith('\n{"train_lr": 0.0, "train_loss": 1.0}\n')
    )
