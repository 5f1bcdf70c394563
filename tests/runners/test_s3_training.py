"""Stage 1 from an S3 server, killed and resumed exactly, with a shard cache smaller than the data."""

import pytest
import torch

from tests.runners.test_preemption import command, finish, said, steps, wait_for, weights  # noqa: F401 (a fixture)
from tests.survival.processes import kill_all
from tests.survival.s3_server import MISSING, REASON, put, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=REASON)]
DATASETS = ("laion", "cc_sbu")


def test_a_run_from_s3_is_killed_and_resumed_as_if_from_files(command, tmp_path):  # noqa: F811
    finish(command("whole"), tmp_path, "whole")

    sizes = [path.stat().st_size for path in sorted((tmp_path / "data").iterdir())]
    # the cache holds three shards; each dataset has five, read by two ranks with four workers each
    bound = 3 * max(sizes)
    cache = tmp_path / "cache"
    more = {"run.shard_cache": cache, "run.shard_cache_gb": bound / 1e9}
    with s3_server() as address:
        for number in range(5):
            for dataset in DATASETS:
                put(address, f"busy/{dataset}/{number}.tar", tmp_path / "data" / f"{number}.tar")
        more |= {
            f"datasets.{name}.build_info.storage": f"s3://busy/{name}/{{0..4}}.tar"
            for name in DATASETS
        }
        process = command("s3", **more)
        wait_for(process, tmp_path, "s3", 25)
        kill_all(process)
        finish(command("s3", **more), tmp_path, "s3")

    assert "Resume checkpoint from" in said(tmp_path, "s3")
    assert steps(tmp_path, "s3") == steps(tmp_path, "whole")
    assert torch.equal(weights(tmp_path, "s3"), weights(tmp_path, "whole"))
    assert "run.shard_cache" in said(tmp_path, "s3") and "0 of" in said(tmp_path, "s3")
    assert 0 < sum(path.stat().st_size for path in cache.iterdir()) <= bound < 2 * sum(sizes)
