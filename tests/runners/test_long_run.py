"""Two hundred steps of the whole model at toy size: memory does not grow, frozen weights do not change."""

import gc
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.common.config import Config
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask

ROOT = Path(__file__).resolve().parents[2]
FROZEN = ("visual_encoder", "ln_vision", "Qformer", "llama_model")


def digest(module):
    """Return the sha256 of all parameters and buffers."""
    content = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content.update(name.encode() + tensor.numpy().tobytes())
    return content.hexdigest()


def held():
    """Return (resident memory in MiB, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="looks at the process as Linux shows it"
)
def test_memory_and_files_stay_and_frozen_parts_are_the_same(
    release, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    changes = {
        "run.output_dir": tmp_path,
        "run.max_epoch": 2,
        "run.iters_per_epoch": 100,
        "run.batch_size_train": 2,
    }
    changes |= {
        "run.num_workers": 1,
        "run.save_every_iters": 10,
        "run.amp": False,
        "run.world_size": 1,
    }
    for name in ("laion", "cc_sbu"):
        changes[f"datasets.{name}.build_info.storage"] = (
            f"{release.root}/{name}_dataset/{{00000..00001}}.tar"
        )
    _, *options = release.options(**changes)
    path = ROOT / "train_configs/minigpt4_stage1_pretrain.yaml"
    cfg = Config(SimpleNamespace(cfg_path=path, options=options), for_training=True)
    task, seen = ImageTextPretrainTask(), []
    run = RunnerBase(cfg, task, task.build_model(cfg), task.build_datasets(cfg))
    before = {name: digest(getattr(run.model, name)) for name in FROZEN}
    train_step = task.train_step

    def watched(model, samples):
        step = samples["epoch"] * 100 + samples["iters"]
        if step % 50 == 49:
            seen.append(held())
        return train_step(model, samples)

    task.train_step = watched
    run.train()
    assert {name: digest(getattr(run.model, name)) for name in FROZEN} == before
    memory, files = zip(*seen, strict=True)
    with capsys.disabled():
        print(
            f"\nsteps 50, 100, 150, 200: {', '.join(f'{m:.0f} MiB' for m in memory)}; open files {files}"
        )
    assert len(seen) == 4
    assert max(memory) < 1.05 * memory[0]  # measured: within 1 %
    assert max(files) <= files[0]
