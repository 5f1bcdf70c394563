"""`torchrun --nproc-per-node 2 train.py` on stage 1 of the quickstart, on the CPU."""

import json
import shutil

import pytest

from minigpt4.quickstart.llm import prepare_llm
from minigpt4.quickstart.prepare import cache_folder
from tests.training import ROOT, torchrun

# Runs train.py unchanged; writes down the samples of each rank and a digest of its final weights.
PROBE = """
import hashlib, json, sys
sys.path.insert(0, {root!r})
from minigpt4 import train
from minigpt4.common.cli import run_program
from minigpt4.common.dist_utils import get_rank
from minigpt4.tasks import BaseTask

seen, models, loss_and_targets = [], [], BaseTask.loss_and_targets

def noted(self, model, samples):
    seen.extend(samples["sample_id"])
    models[:] = [model, get_rank()]
    return loss_and_targets(self, model, samples)

BaseTask.loss_and_targets = noted
code = run_program(train.train, train.parse_args(sys.argv[2:]))
model, rank = models
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.llama_proj.parameters())).hexdigest()
json.dump({{"seen": seen, "digest": digest}}, open(f"{{sys.argv[1]}}/rank_{{rank}}.json", "w"))
sys.exit(code)
"""


@pytest.mark.slow
def test_two_ranks_train_the_embedded_default(cache, tmp_path):
    """With the real LLM, but few images: drawing all 9,000 would nearly double the time."""
    root = tmp_path / "cache"
    shutil.copytree(cache, root, symlinks=True)
    (root / "embedded/llm").unlink()
    (root / "embedded/llm").symlink_to(prepare_llm(cache_folder() / "llm"))
    script = tmp_path / "probe.py"
    script.write_text(PROBE.format(root=str(ROOT)))
    output = tmp_path / "output"
    settings = [
        "run.iters_per_epoch=3",
        "run.batch_size_train=4",
        "run.num_workers=1",
        f"run.output_dir={output}",
        f"env.cache_root={root}",
    ]
    arguments = [
        "--cfg-path",
        "train_configs/embedded_stage1_pretrain.yaml",
        "--options",
        *settings,
    ]
    code, said = torchrun(script, tmp_path, *arguments, timeout=300)
    assert code == 0, said
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first["digest"] == second["digest"]
    assert len(first["seen"]) == len(second["seen"]) == 12
    assert len({*first["seen"], *second["seen"]}) == 24
    (folder,) = output.iterdir()  # of rank 0; rank 1 made none
    assert {path.name for path in folder.iterdir()} == {
        *(
            "checkpoint_0.pth",
            "log.txt",
            "loss.png",
            "metrics.jsonl",
            "result",
            "run_card.json",
            "run_card.md",
        ),
    }
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
