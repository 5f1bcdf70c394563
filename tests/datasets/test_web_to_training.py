"""From a caption list and images on a web server to training, with the real img2dataset, nothing simulated.

The web server runs on loopback. img2dataset is installed once from the package registry, into the folder where the
download scripts keep it for the user.
"""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from minigpt4.datasets.download_stats import describe, read_download_stats, storage_of
from tests.datasets.image_server import FAULTS, PATIENCE_S, USABLE, kinds, serving
from tests.datasets.shards import stream
from tests.datasets.test_web_dataset import one_pass

pytestmark = [pytest.mark.slow, pytest.mark.registry]

ROOT = Path(__file__).resolve().parents[2]
URLS, PER_SHARD, MALFORMED, BATCH_SIZE, IMAGE_SIZE = 300, 50, 3, 9, 128
KINDS = kinds(URLS)
SUCCESSES = sum(kind in USABLE for kind in KINDS)
ENVIRONMENT = {
    **os.environ,
    "no_proxy": "127.0.0.1",
    "NO_PROXY": "127.0.0.1",
    "PYTHON": sys.executable,
}


def run(command, folder, expect=0):
    """Return the finished process of a command that must end with the code `expect`."""
    result = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def download(folder, *options, expect=0):
    command = ["sh", str(ROOT / "dataset/download_laion.sh"), *options]
    return run(command, folder, expect)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Skips the tests if img2dataset is not installed and the registry cannot be reached."""
    if os.environ.get("MINIGPT4_OFFLINE"):
        pytest.skip("MINIGPT4_OFFLINE is set")
    help_text = download(tmp_path_factory.mktemp("help"), "--help").stdout
    place = re.search(r"where img2dataset lives, now (.*)\)", help_text)[1]
    version = re.search(r"img2dataset-([\d.]+)", help_text)[1]
    if not Path(place, "bin/python").exists():
        probe = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--retries",
            "0",
            "--timeout",
            "20",
            "--quiet",
        ]
        probe += ["--dest", str(tmp_path_factory.mktemp("probe")), f"img2dataset=={version}"]
        result = subprocess.run(probe, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(
                f"the package registry cannot be reached: {result.stderr.strip().splitlines()[-1]}"
            )


@pytest.fixture(scope="module")
def downloaded(registry, tmp_path_factory):
    """Return (folder of all files, what the scripts printed, requests by path, requests by path of a second run)."""
    folder = tmp_path_factory.mktemp("web")
    with serving() as server:
        records = [
            {"url": f"{server.address}/{kind}/{number}", "caption": f'Image "{number}", café'}
            for number, kind in enumerate(KINDS)
        ]
        records[7] = dict(reversed(records[7].items()))  # another order of keys
        records += [{"url": f"{server.address}/jpeg/no_caption"}, {"caption": "no url"}, None]
        first, *others = records
        random.Random(0).shuffle(others)
        (folder / "laion_synthetic_filtered_large.json").write_text(
            json.dumps([first, *others]), encoding="utf-8"
        )
        converted = run([sys.executable, str(ROOT / "dataset/convert_laion.py")], folder).stdout
        options = ["--processes_count", "2", "--thread_count", "16", "--timeout", str(PATIENCE_S)]
        options += [f"--number_sample_per_shard={PER_SHARD}", "--image_size", str(IMAGE_SIZE)]
        printed = download(folder, *options).stdout
        asked = server.asked.copy()
        server.asked.clear()
        for ending in (".tar", "_stats.json"):
            (folder / f"laion_dataset/00002{ending}").unlink()
        download(folder, *options)
        return folder, converted + printed, asked, server.asked


def test_every_url_is_requested_once_and_malformed_records_are_reported(downloaded):
    _, printed, asked, _ = downloaded
    assert f"{URLS} rows of url, caption; {URLS + MALFORMED} records read" in printed
    assert f"left out: {MALFORMED} records" in printed
    assert asked == {f"/{kind}/{number}": 1 for number, kind in enumerate(KINDS)}


def test_a_second_start_does_only_what_is_not_finished(downloaded):
    assert len(downloaded[3]) == PER_SHARD and set(downloaded[3].values()) == {1}


def test_stats_show_what_failed_and_why(downloaded):
    folder, printed, *_ = downloaded
    stats = read_download_stats(folder / "laion_dataset")
    assert (stats.shards, stats.unfinished) == (URLS // PER_SHARD, [])
    assert (stats.count, stats.successes) == (URLS, SUCCESSES)
    assert stats.failed_to_resize == FAULTS["page"]
    assert stats.failed_to_download == sum(
        FAULTS[kind] for kind in ("gone", "cut", "stuck", "refused")
    )
    assert stats.status["HTTP Error 404: Not Found"] == FAULTS["gone"]
    assert stats.status["success"] == SUCCESSES and stats.status.total() == URLS
    assert "\n".join(describe(stats)) in printed
    assert f"storage: {folder}/laion_dataset/{{00000..00005}}.tar" in printed


def test_tars_inspection_and_training_agree_with_the_stats(downloaded, release, tmp_path):
    shards = storage_of(downloaded[0] / "laion_dataset")
    captions = {}
    for path in sorted((downloaded[0] / "laion_dataset").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    assert (record["width"], record["height"]) == (IMAGE_SIZE, IMAGE_SIZE)
                    captions[record["url"].rsplit("/", 1)[1]] = record["caption"]
    assert captions == {
        str(i): f'Image "{i}", café' for i, kind in enumerate(KINDS) if kind in USABLE
    }

    dataset = stream(shards, epochs=1)
    assert len(one_pass(dataset)) == SUCCESSES and dataset.skips.report() == {"seen": SUCCESSES}

    steps, rest = divmod(SUCCESSES, BATCH_SIZE)
    assert rest == 0  # so that one pass over the samples is a whole number of batches
    config = write_config(shards, steps, release, tmp_path)
    look = [
        sys.executable,
        "-m",
        "minigpt4.datasets.inspect",
        "--cfg-path",
        config,
        "--scan",
        "all",
        "--num",
        "4",
    ]
    printed = run([*look, "--output", str(tmp_path / "sheet.html")], ROOT).stdout
    assert (
        f"  shards    {URLS // PER_SHARD} found, 0 missing\n  download  {SUCCESSES} of {URLS} images ("
        in printed
    )
    assert f"{FAULTS['gone']}  HTTP Error 404: Not Found" in printed
    assert f"  scanned   all {SUCCESSES} samples\n  usable    {SUCCESSES} (100.0%)\n" in printed
    assert (tmp_path / "sheet.html").is_file()

    result = run([sys.executable, "train.py", "--cfg-path", config], ROOT)
    assert f"laion: 0 of {SUCCESSES} samples skipped" in result.stdout
    assert len(next(tmp_path.glob("output/*/metrics.jsonl")).read_text().splitlines()) == steps


def write_config(shards, steps, release, folder):
    """Return the path of stage 1 of the embedded default, with a toy LLM, on the downloaded shards alone."""
    config = yaml.safe_load((ROOT / "train_configs/embedded_stage1_pretrain.yaml").read_text())
    config["datasets"] = {"laion": config["datasets"]["laion"]}
    config["datasets"]["laion"]["build_info"]["storage"] = shards
    config["model"]["llama_model"] = str(release.llama)
    config["run"] |= {"iters_per_epoch": steps, "batch_size_train": BATCH_SIZE, "device": "cpu"}
    config["run"]["output_dir"] = str(folder / "output")
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "train.yaml")


def test_a_misspelt_option_is_reported_before_any_download(downloaded, tmp_path):
    (tmp_path / "list.tsv").write_text("url\tcaption\r\n")
    for option in ("--proceses_count=4", "--output_folder"):
        assert (
            f"unknown option {option.split('=')[0]};"
            in download(tmp_path, "list.tsv", option, "x", expect=2).stderr
        )
    assert {path.name for path in tmp_path.iterdir()} == {"list.tsv"}
