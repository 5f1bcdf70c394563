"""The training step on a small real model: accumulation, clipping, non-finite numbers, full memory."""

import hashlib
import itertools
import json

import pytest
import torch

from minigpt4.common.logger import NonFiniteLossError
from minigpt4.runners import RunnerBase
from tests.golden.model import CONFIG, golden_model
from tests.training import batches, by_hand, endless, runner, settings, tiny_model, trained, weights


def digest(module):
    content = b"".join(
        name.encode() + value.numpy().tobytes() for name, value in module.state_dict().items()
    )
    return hashlib.sha256(content).hexdigest()


def test_accumulation_equals_the_large_batch(tmp_path):
    data = torch.cat([batch["image"] for batch in batches(8, 6)])
    # a constant learning rate, since the schedule counts batches
    flat = {"warmup_lr": 0.05, "min_lr": 0.05, "max_epoch": 1}
    found = []
    for accum in (1, 2, 4):
        fixed = [
            {"image": images, "text_input": [""] * len(images)} for images in data.split(8 // accum)
        ]
        changes = {"iters_per_epoch": 6 * accum, "accum_grad_iters": accum}
        found.append(weights(trained(tmp_path, fixed, **flat, **changes)))
    found.append(weights(trained(tmp_path, fixed, **flat, **changes, max_tokens_per_batch=1)))
    moved = (found[0] - weights(runner(settings(tmp_path)))).abs().max()
    assert moved > 0.1
    for other in found[1:]:  # float32 sums in another order: 1e-7 each, over 6 steps
        assert (found[0] - other).abs().max() < 1e-6


def parted(data, *sizes):
    """Return all of `data` in batches of these sizes, in turn."""
    sizes = list(sizes) * (len(data) // sum(sizes))
    return [{"image": images, "text_input": [""] * len(images)} for images in data.split(sizes)]


@pytest.mark.parametrize("reduction", ["tokens", "mean"])
def test_accumulated_batches_of_unequal_size_count_by_their_targets(tmp_path, reduction):
    """Each sample is one target here. With `mean` every batch has the same weight, which gives another training."""
    data = torch.cat([batch["image"] for batch in batches(8, 6)])
    flat = {"warmup_lr": 0.05, "min_lr": 0.05, "max_epoch": 1, "accum_reduction": reduction}
    whole = weights(trained(tmp_path, parted(data, 8), iters_per_epoch=6, **flat))
    for limit in (None, 2):
        changes = {"iters_per_epoch": 18, "accum_grad_iters": 3, "max_tokens_per_batch": limit}
        found = weights(trained(tmp_path, parted(data, 1, 5, 2), **flat, **changes))
        assert ((found - whole).abs().max() < 1e-6) == (reduction == "tokens")


@pytest.mark.parametrize("reduction", ["tokens", "mean"])
def test_ranks_count_by_their_targets(two_ranks, tmp_path, reduction):
    data = torch.cat([batch["image"] for batch in batches(8, 6)])
    flat = {"warmup_lr": 0.05, "min_lr": 0.05, "max_epoch": 1, "accum_reduction": reduction}

    def work(rank):
        halves = [
            batch for batch in parted(data, 2, 1, 4, 1) if (len(batch["image"]) > 1) == (rank == 0)
        ]
        run = trained(
            tmp_path / "ranks_train", halves, iters_per_epoch=12, accum_grad_iters=2, **flat
        )
        torch.save(weights(run), tmp_path / f"{rank}.pth")

    code, *_ = two_ranks(work)
    found = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    whole = weights(trained(tmp_path, parted(data, 8), iters_per_epoch=6, **flat))
    assert code == 0 and torch.equal(*found)
    assert ((found[0] - whole).abs().max() < 1e-6) == (reduction == "tokens")


def test_captions_of_unequal_length_accumulate_to_the_large_batch(tmp_path):
    """With the real model, whose targets are the tokens of the captions."""
    images = torch.randn(
        3, 3, CONFIG["image_size"], CONFIG["image_size"], generator=torch.Generator().manual_seed(4)
    )
    texts = ["a", "a very long caption of a bird on a branch", "two birds"]
    parts = [{"image": images[i : i + 1], "text_input": texts[i : i + 1]} for i in range(3)]
    changes = {"max_epoch": 1, "warmup_lr": 0.05, "min_lr": 0.05, "weight_decay": 0.0}

    def gradient(fixed, **more):
        """The first moment after one update is a tenth of its gradient."""
        run = trained(
            tmp_path, fixed, golden_model(tmp_path), iters_per_epoch=len(fixed), **changes, **more
        )
        return torch.cat(
            [10 * state["exp_avg"].flatten() for state in run.optimizer.state.values()]
        )

    whole = gradient([{"image": images, "text_input": texts}])
    same, other = (
        gradient(parts, accum_grad_iters=3, accum_reduction=how) for how in ("tokens", "mean")
    )
    assert (same - whole).abs().max() < 1e-5 * whole.abs().max()
    assert (other - whole).abs().max() > 0.01 * whole.abs().max()


@pytest.mark.parametrize("reduction", ["tokens", "mean", "sum"])
def test_what_an_epoch_leaves_over(tmp_path, reduction):
    """The batches left at an epoch's end make an update of their own mean; with `sum` they go into the next epoch's first."""
    # small gradients, so that AdamW's epsilon makes sum and mean differ
    fixed = batches(scale=0.01)
    changes = {"warmup_lr": 0.05, "min_lr": 0.05, "iters_per_epoch": 3, "accum_grad_iters": 2}
    run = trained(tmp_path, fixed, accum_reduction=reduction, **changes)
    a, b, c, d, e = fixed
    mean = [(2, [a, b]), (1, [c]), (2, [d, e]), (1, [a])]
    total = [(1, [a, b]), (1, [c, d, e])]
    expected, other = (total, mean) if reduction == "sum" else (mean, total)
    assert (weights(run) - by_hand(expected, lr=0.05)).abs().max() < 1e-6
    assert (weights(run) - by_hand(other, lr=0.05)).abs().max() > 1e-3


def test_clipping_bounds_the_gradient_that_adamw_sees(tmp_path):
    one_step = {"max_epoch": 1, "iters_per_epoch": 1, "beta2": 0.9}
    free, clipped = trained(tmp_path, **one_step), trained(tmp_path, max_grad_norm=0.01, **one_step)

    def gradient_norm(run):  # the first moment after one step is 0.1 of the gradient
        moments = [state["exp_avg"] for state in run.optimizer.state.values()]
        return 10 * torch.cat([moment.flatten() for moment in moments]).norm()

    assert gradient_norm(free) > 0.1
    assert gradient_norm(clipped) == pytest.approx(0.01, rel=1e-3)


def test_only_the_projection_changes(tmp_path):
    model = tiny_model()
    before = digest(model.visual_encoder), digest(model.llama_proj)
    trained(tmp_path, model=model)
    assert digest(model.visual_encoder) == before[0]
    assert digest(model.llama_proj) != before[1]


def with_nan(fixed, index=3):
    """Return batches of which one has a nan loss."""
    bad = {
        "image": fixed[index]["image"] * float("nan"),
        "text_input": ["a"],
        "sample_id": ["00017.tar/000123"],
    }
    return [*fixed[:index], bad, *fixed[index + 1 :]]


@pytest.mark.parametrize("accum", [1, 2])
def test_a_loss_of_nan_costs_one_update(tmp_path, accum, caplog, capsys):
    changes = {
        "max_epoch": 1,
        "iters_per_epoch": 6,
        "accum_grad_iters": accum,
        "warmup_lr": 0.05,
        "min_lr": 0.05,
    }
    run = trained(tmp_path, with_nan(batches(number=6)), **changes)
    a, b, c, _, e, f = batches(number=6)
    groups = (
        [(1, [a]), (1, [b]), (1, [c]), (1, [e]), (1, [f])]
        if accum == 1
        else [(2, [a, b]), (2, [e, f])]
    )
    assert (weights(run) - by_hand(groups, lr=0.05)).abs().max() < 1e-6
    assert (
        "step 3: loss is nan on rank 0 (samples 00017.tar/000123); optimizer not stepped"
        in caplog.text
    )
    assert "step 3: update skipped on all ranks, 1 in a row, 1 so far" in capsys.readouterr().out
    steps = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step["loss"] is None for step in steps] == [False, False, False, True, False, False]
    log = json.loads((run.output_dir / "log.txt").read_text().splitlines()[-1])
    assert log["train_loss"] == pytest.approx(
        sum(step["loss"] or 0 for step in steps) / 5, rel=1e-12
    )


def test_a_gradient_that_is_not_finite_costs_one_update(tmp_path, capsys):
    """The loss is finite; its gradient, 1 / (2 sqrt 0), is not."""
    model, calls = tiny_model(), []

    class Root(torch.nn.Module):
        def forward(self, x):
            calls.append(1)
            return x + (x * 0).abs().sqrt() if len(calls) == 4 else x

    model.dropout = torch.nn.Identity()
    model.llama_proj.register_forward_hook(lambda module, args, result: Root()(result))
    run = trained(tmp_path, model=model)
    assert torch.isfinite(weights(run)).all()
    assert "step 3: update skipped on all ranks, 1 in a row, 1 so far" in capsys.readouterr().out


def without_gradients(model, calls):
    """Return a model whose gradient is not finite in the forward passes `calls`; its losses are finite."""
    number = itertools.count()

    def spoil(module, args, result):
        return result + (result * 0).abs().sqrt() if next(number) in calls else result

    model.llama_proj.register_forward_hook(spoil)
    return model


def scaled(run):
    """Return the runner with the gradient scaler of float16."""
    run.scaler = torch.amp.GradScaler("cpu", enabled=True)
    return run


def test_gradients_that_no_scale_makes_finite_end_the_run(tmp_path):
    """From its initial 2^16 the scaler halves its scale to 1 in 16 updates, which are not counted."""
    cfg = settings(tmp_path, max_epoch=1, iters_per_epoch=30, max_skipped_updates=3)
    run = scaled(runner(cfg, without_gradients(tiny_model(), range(30))))
    message = "step 18: a gradient is not finite; optimizer not stepped; 3 in a row"
    with pytest.raises(NonFiniteLossError, match=message):
        run.train(endless(batches()))
    assert run.scaler.get_scale() == 2**-3 and run.output_dir.is_dir()


def test_updates_that_the_scaler_skips_in_search_of_its_scale_are_not_counted(tmp_path, capsys):
    cfg = settings(tmp_path, max_epoch=1, iters_per_epoch=12, max_skipped_updates=1)
    run = scaled(runner(cfg, without_gradients(tiny_model(), range(10))))
    before = weights(run).clone()
    run.train(endless(batches()))
    assert "update skipped" not in capsys.readouterr().out
    assert run.scaler.get_scale() == 2**6 and not torch.equal(weights(run), before)


def test_losses_of_nan_in_a_row_end_the_run_before_the_weights_are_touched(tmp_path):
    fixed = with_nan(batches())
    run = runner(settings(tmp_path, max_skipped_updates=1))
    message = r"step 3: loss is nan on rank 0 \(samples 00017.tar/000123\); optimizer not stepped; 1 in a row"
    with pytest.raises(NonFiniteLossError, match=message):
        run.train(endless(fixed))
    assert torch.isfinite(weights(run)).all()
    assert not list(run.output_dir.glob("*.pth"))


def too_large_for_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def too_large_for_the_machine():
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "allocate, begins",
    [
        (too_large_for_the_gpu, "the GPU is full (CUDA out of memory)"),
        (
            too_large_for_the_machine,
            f"the memory of the machine is full (tried to allocate {2**60} bytes)",
        ),
    ],
)
def test_full_memory_is_explained_with_the_settings_that_help(tmp_path, allocate, begins):
    cfg = settings(tmp_path, batch_size_train=64)
    cfg.pretty_print = lambda: None
    with pytest.raises(MemoryError) as caught, RunnerBase.launched(cfg):
        allocate()
    message = str(caught.value)
    assert message.startswith(begins) and "run.batch_size_train (now 64)" in message
    for key in (
        "run.accum_grad_iters",
        "model.llm_quantization=int8",
        "model.max_txt_len",
        "model.use_grad_checkpoint",
    ):
        assert key in message
