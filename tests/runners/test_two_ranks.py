"""Two processes train as one."""

import json
from pathlib import Path

import torch

from tests.training import found_by_two_ranks, trained

TWO_RANKS = """
import json, os, sys
import torch
from omegaconf import OmegaConf
from minigpt4.common import dist_utils
from minigpt4.common.launchers import launched_processes
from minigpt4.runners import RunnerBase
from tests.small_release import write_align_folder, write_shard
from tests.training import TinyModel, batches, endless, runner, settings

root, rank = sys.argv[1], int(os.environ["RANK"])
cfg = settings(f"{root}/of_rank_{rank}")
cfg.pretty_print = lambda: None
before = OmegaConf.to_container(cfg.run_cfg)
with RunnerBase.launched(cfg):
    found = {"drawn": torch.rand(1).item(), "proj": [], "frozen": [], "buffer": [], "output_dir": []}
    halves = [{"image": b["image"].chunk(2)[rank], "text_input": ["a"] * 2} for b in batches()]
    for frozen_value in (0.5 + rank, 0.5):
        torch.manual_seed(rank)  # different weights on every rank
        model = TinyModel(frozen_value=frozen_value)
        run = runner(cfg, model)
        run.train(endless(halves))
        found["proj"].append(model.llama_proj.weight.tolist())
        found["frozen"].append(model.visual_encoder.weight[0, 0].item())
        found["buffer"].append(model.visual_encoder.scale.item())
        found["output_dir"].append(str(run.output_dir))
    launch, after = launched_processes(cfg.run_cfg)._asdict(), OmegaConf.to_container(cfg.run_cfg)
    launch |= {"dist_backend": torch.distributed.get_backend(), "distributed": dist_utils.is_distributed()}
    found["run"] = launch
    found["is_config_untouched"] = after == before
    json.dump(found, open(f"{root}/found_{rank}.json", "w"))
print("left", dist_utils.is_distributed())
"""


def test_two_ranks_train_as_one(tmp_path):
    first, second, output = found_by_two_ranks(TWO_RANKS, tmp_path)
    # weights that are initialised before training are the same on all ranks
    assert first["drawn"] == second["drawn"]
    assert first["proj"] == second["proj"]
    # nothing frozen was sent,
    assert (first["frozen"], second["frozen"]) == ([0.5, 0.5], [1.5, 0.5])
    assert (first["buffer"], second["buffer"]) == ([0.5, 0.5], [1.5, 0.5])  # nor a buffer
    alone = trained(tmp_path / "alone").model.llama_proj.weight
    # the mean of two halves' gradients: float32 rounding over 12 steps
    assert (torch.tensor(first["proj"][1]) - alone).abs().max() < 1e-6
    launch = {
        "rank": 1,
        "world_size": 2,
        "local_rank": 1,
        "dist_backend": "gloo",
        "distributed": True,
    }
    assert second["run"] == launch and second["is_config_untouched"]
    assert not (tmp_path / "of_rank_1").exists() and second["output_dir"] == first["output_dir"]
    folder = Path(first["output_dir"][0])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # a second writer would double the lines
    assert [step["samples"] for step in steps] == list(range(4, 52, 4))
    assert output.count("| distributed init (rank ") == 2
    assert output.count("number of trainable parameters") == output.count("Training time") == 2
    assert output.count("left False") == 2
    saved = torch.load(folder / "checkpoint_1.pth", weights_only=True)["model"]
    assert saved["llama_proj.weight"].tolist() == first["proj"][0]
