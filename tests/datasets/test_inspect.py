"""`python -m minigpt4.datasets.inspect` on both embedded stages, and on data with every kind of fault."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from minigpt4.common.cli import run_program
from minigpt4.common.config import Config, ConfigError
from minigpt4.common.device import to_device
from minigpt4.datasets import inspect
from minigpt4.datasets import scan as scanning
from minigpt4.datasets.datasets.map_style import adapted
from minigpt4.datasets.datasets.skips import REASONS
from minigpt4.datasets.sheet import summary
from minigpt4.models import MiniGPT4
from minigpt4.processors import BaseProcessor, Blip2ImageEvalProcessor, Blip2ImageTrainProcessor
from tests.datasets.shards import folder_dataset, ids, jpeg, loader, pair, shard, stream, write_tar
from tests.golden.model import FOLDER, golden_config

ROOT = Path(__file__).resolve().parents[2]
LONG = "an image of a dog that runs and of a cat that sleeps, " * 3
NO_IMAGE = {"json": b'{"caption": "text"}'}
FAULTS = {  # reason -> members of a sample that is skipped for it
    "no_image": NO_IMAGE,
    "no_caption": {"jpg": jpeg(0)},
    "bad_caption": {"jpg": jpeg(0), "json": b'{"caption": 7}'},
    "bad_image": {"jpg": b"no image", **NO_IMAGE},
}


class Look:
    """Runs the program in this process, on small data for both embedded stages."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys
        self.output = folder / "sheet.html"
        for name in ("laion", "cc_sbu"):
            (folder / name).mkdir()
            for number in range(2):
                numbers = range(4 * number, 4 * number + 4)
                shard(folder / name, f"{number:05d}", numbers)
        (folder / "align").mkdir()
        folder_dataset(folder / "align", range(6))

    def __call__(self, stage, *options, more=(), expect=0):
        """Return what the program prints; `expect`: its exit code."""
        storage = "datasets.{}.build_info.storage={}"
        options = ["model.llama_model=" + str(FOLDER / "model/llama"), *options]
        if stage == 1:
            names, shards = ("laion", "cc_sbu"), "{00000..00001}.tar"
            options = [
                *(storage.format(name, self.folder / name / shards) for name in names),
                *options,
            ]
        else:
            options = [storage.format("cc_sbu_align", self.folder / "align"), *options]
        yaml = {1: "embedded_stage1_pretrain.yaml", 2: "embedded_stage2_finetune.yaml"}[stage]
        return self.run(f"train_configs/{yaml}", *more, "--options", *options, expect=expect)

    def run(self, config, *arguments, expect=0):
        args = inspect.parse_args(
            ["--cfg-path", str(config), "--output", str(self.output), *arguments]
        )
        code = run_program(inspect.inspect, args)
        printed = self.capsys.readouterr()
        assert code == expect, printed.out + printed.err
        return printed.out + (printed.err if expect else "")


@pytest.fixture
def look(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Look(tmp_path, capsys)


@pytest.fixture
def sheets(monkeypatch):
    """Return a list that collects the (title, notes, groups) of every sheet that is written."""
    seen, real = [], inspect.sheet
    monkeypatch.setattr(inspect, "sheet", lambda *args: seen.append(real(*args)) or seen[-1])
    return seen


def text_of(tokens):
    return [token.text for token in tokens]


def text(card, *kinds):
    return "".join(token.text for token in card.tokens if token.kind in kinds)


# both stages


def test_stage_1(look, sheets):
    printed = look(1)
    assert (
        printed.count(
            "  shards    2 found, 0 missing\n  download  no statistics of img2dataset in "
        )
        == 2
    )
    assert (
        printed.count(
            "  scanned   all 8 samples\n  usable    8 (100.0%)\n  text      tokens, end symbol incl"
        )
        == 2
    )
    assert printed.endswith(f"sheet: {look.output} (16 samples)\n")
    ((title, notes, groups),) = sheets
    assert title == "What the model sees and learns: embedded_stage1_pretrain.yaml"
    assert notes == ["at most 32 tokens of text (max_txt_len)   end_sym '\\n'   prompt: none"]
    assert [heading.split(":")[0] for heading, _ in groups] == ["laion", "cc_sbu"]
    for name, (_, cards) in zip(("laion", "cc_sbu"), groups, strict=True):
        expected = {f"caption {number}\n" for number in range(8)}  # through blip_caption
        assert {text(card, "target") for card in cards} == expected
        assert all(text(card, "prompt", "given", "cut") == "" for card in cards)
        assert {card.sample_id.split("/")[0] for card in cards} == {name}
    html = look.output.read_text(encoding="utf-8")
    assert (
        html.startswith("<!DOCTYPE html>") and html.count("<figure>") == html.count("<img ") == 16
    )


def test_stage_2(look, sheets):
    printed = look(2, more=["--num", "3"])
    assert (
        "cc_sbu_align\n  scanned   all 6 samples\n  usable    6 (100.0%)\n" in printed
        and "shards" not in printed
    )
    assert (
        "train.py would not start yet:\n  model.ckpt: '/path/to/stage1/checkpoint/' is the placeholder"
        in printed
    )
    ((_, notes, ((_, cards),)),) = sheets
    assert (
        notes[1] == "prompt_template '<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n'"
    )
    prompts = (
        (ROOT / "prompts/embedded_alignment.txt")
        .read_text()
        .replace("<ImageHere>", "")
        .splitlines()
    )
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert len(cards) == 3
    for card in cards:
        assert text(card, "prompt") in {before + prompt + after for prompt in prompts}
        number = card.sample_id.removeprefix("cc_sbu_align/")
        assert text(card, "target") == f"Caption {number}.<|im_end|>"


def test_a_wrong_prompt_is_visible(look, sheets):
    """ChatML's markers are plain text for a LLaMA tokenizer: many tokens, none of them framed as special."""
    look(2, more=["--num", "1"])
    wrong = look.output.read_bytes()
    look(2, "model.prompt_template=<s>[INST] {} [/INST]", "model.end_sym=</s>", more=["--num", "1"])
    assert wrong != look.output.read_bytes()
    cards = [groups[0][1][0] for _, _, groups in sheets]
    special = [
        filter(lambda token: token.is_special and token.kind != "begin", card.tokens)
        for card in cards
    ]
    assert [text_of(tokens) for tokens in special] == [[], ["<s>", "</s>"]]


def test_truncation_is_counted_and_shown_on_the_sheet(look, sheets):
    samples = {
        f"{number:06d}": pair(number, LONG if number == 17 else "short") for number in range(20)
    }
    write_tar(look.folder / "laion/00000.tar", samples)
    printed = look(1, more=["--num", "8"])
    laion, cc_sbu = printed.split("\ncc_sbu\n")
    assert "  cut       1 of 24 texts (4.2%) are longer than model.max_txt_len=32\n" in laion
    assert "  cut       0 of 8 texts (0.0%) are" in cc_sbu
    ((_, _, ((heading, cards), _)),) = sheets
    assert heading == "laion: 4 of 24 samples; 4.2% of the texts are cut"
    (card,) = [card for card in cards if text(card, "cut")]
    assert (
        card.sample_id.endswith("/000017") and text(card, "target", "cut") == LONG.strip(" ") + "\n"
    )
    kept = sum(token.size for token in card.tokens if token.kind == "target")
    cut = sum(token.size for token in card.tokens if token.kind == "cut")
    assert (kept, summary(card.tokens)[1]) == (32, f"{cut} tokens cut off")
    assert f"longest {kept + cut}\n" in laion


def test_percentiles_are_those_of_the_texts(look):
    found = scanning.Scan(None)
    for length in [*range(1, 101), 500]:
        found.lengths[length] += 1
    assert [found.percentile(percent) for percent in (5, 50, 95, 100)] == [6, 51, 96, 500]


def test_conversations_show_what_is_learnt_of_them(look, sheets, tmp_path):
    turns = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A dog."),
        ("human", "Which colour?"),
        ("gpt", "Brown."),
    ]
    record = {
        "image": "0.jpg",
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }
    (tmp_path / "talks.json").write_text(json.dumps([record]))
    base = (ROOT / "train_configs/embedded_stage2_finetune.yaml").read_text()
    head, rest = base.split("datasets:\n")
    section = f"""datasets:
  talks:
    builder: image_text_jsonl
    build_info: {{storage: {tmp_path}/talks.json, images: {tmp_path}/align/image}}
    vis_processor: {{train: {{name: blip2_image_train, image_size: 112}}}}

run:"""
    (tmp_path / "talks.yaml").write_text(head + section + rest.split("\nrun:")[1])
    options = [
        f"model.llama_model={FOLDER}/model/llama",
        "model.prompt_template='[INST] {} [/INST]'",
    ]
    look.run(
        tmp_path / "talks.yaml",
        "--options",
        *options,
        "model.end_sym=</s>",
        "model.mask_eos_labels=False",
    )
    ((_, _, ((_, (card,)),)),) = sheets
    assert text(card, "prompt") == "[INST] <Img></Img> What is it? [/INST]"
    assert text(card, "target") == "A dog.</s> Brown.</s>"
    assert text(card, "given").strip() == "<s> [INST] Which colour? [/INST]"


# the samples are those of training


def scan(dataset, limit=None, num_shown=100, seed=42):
    preview = SimpleNamespace(lengths=lambda samples: [(1, 0)] * len(samples))
    return scanning.scan(dataset, preview, seed, limit, num_shown)


def test_streams_are_read_in_trainings_order_with_its_augmentation(tmp_path):
    shards = [
        shard(tmp_path, name, range(first, first + 30))
        for first, name in ((0, "a"), (30, "b"), (60, "c"))
    ]
    found = scan(stream(shards))
    trained = loader([stream(shards)], batch_size=90, seed=42)
    batch = to_device(next(trained), torch.device("cpu"))
    assert [f"laion/{sample['sample_id']}" for sample, _ in found.shown] == batch["sample_id"][:90]
    assert torch.equal(torch.stack([sample["image"] for sample, _ in found.shown]), batch["image"])


def test_folders_are_read_in_trainings_order_with_its_augmentation(tmp_path):
    found = scan(folder_dataset(tmp_path, range(12)))
    trained = loader([folder_dataset(tmp_path, range(12))], batch_size=12, seed=42)
    batch = to_device(next(trained), torch.device("cpu"))
    assert [f"cc_sbu_align/{sample['sample_id']}" for sample, _ in found.shown] == ids([batch])
    assert torch.equal(torch.stack([sample["image"] for sample, _ in found.shown]), batch["image"])
    assert found.is_whole and found.lengths.total() == 12


def test_the_scan_is_bounded(look, tmp_path):
    printed = look(1, more=["--scan", "3"])
    assert (
        printed.count(
            "scanned   the first 3 samples in training's order (--scan all for the rest)\n  usable    3 ("
        )
        == 2
    )
    found = scan(folder_dataset(tmp_path, range(12)), limit=5)
    assert (found.lengths.total(), found.is_whole) == (5, False)


@pytest.mark.parametrize("processor", [Blip2ImageEvalProcessor, Blip2ImageTrainProcessor])
def test_the_image_is_the_one_that_the_model_sees(processor):
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    image.putpixel((0, 0), (255, 0, 1))
    process = processor(
        image_size=16, **({"min_scale": 1.0} if processor is Blip2ImageTrainProcessor else {})
    )
    torch.manual_seed(0)
    pixels = process(image)
    shown = process.to_image(pixels)
    torch.manual_seed(0)
    geometry, *_ = process.transform.transforms
    assert shown.tobytes() == geometry(image).tobytes()
    assert BaseProcessor().to_image(torch.full((3, 2, 2), 0.5)).getpixel((0, 0)) == (128, 128, 128)


# a user's own dataset


class Own(Dataset):
    """Grey images as numpy arrays; the question of the sample `faulty` has no image slot."""

    def __init__(self, vis_processor=None, faulty=None):
        self.vis_processor, self.faulty = vis_processor, faulty

    def __len__(self):
        return 6

    def __getitem__(self, index):
        question = "Which?" if index == self.faulty else "<Img><ImageHere></Img> Which?"
        image = np.full((3, 2, 2), 0.5, np.float32)
        return {"image": image, "instruction_input": question, "answer": "Grey."}


@pytest.fixture
def preview(tmp_path):
    return MiniGPT4.text_preview(golden_config(tmp_path, end_sym="###", max_txt_len=32))


@pytest.mark.parametrize("vis_processor", [None, lambda image: image])
def test_any_processor_and_numpy_images_are_shown(preview, vis_processor):
    found = scanning.scan(adapted(Own(vis_processor), "own"), preview, 1, None, 1)
    cfg = SimpleNamespace(model_cfg=preview.settings, run_cfg=SimpleNamespace(seed=1))
    _, _, [(_, [card])] = inspect.sheet([found], preview, cfg, SimpleNamespace(cfg_path="a.yaml"))
    assert [image.getpixel((1, 1)) for image in card.images] == [(128, 128, 128)]


def test_a_sample_that_the_model_refuses_is_named(preview):
    found = scanning.scan(adapted(Own(faulty=4), "own"), preview, 1, None, 6)
    problem = "0 image slots in the questions, the sample has 1 images"
    assert found.error == f"sample record 4: instruction: {problem}"


# faults


def test_skipped_samples_are_counted_as_training_counts_them(look, caplog):
    faults = {f"9{number:05d}": members for number, members in enumerate(FAULTS.values())}
    write_tar(
        look.folder / "laion/00000.tar",
        {"000001": pair(1)} | faults | {"900009": FAULTS["bad_image"]},
    )
    cut = look.folder / "laion/00001.tar"
    with tarfile.open(cut) as tar:
        end = tar.getmembers()[-1].offset_data + 3
    cut.write_bytes(cut.read_bytes()[:end])
    dataset = stream(str(look.folder / "laion/{00000..00001}.tar"), epochs=1)
    usable = len(list(dataset))
    counts = dataset.skips.report()
    assert counts.keys() == {"seen", "bad_shard", *FAULTS} and counts["bad_image"] == 2
    printed = look(1).split("\ncc_sbu\n")[0]
    assert f"scanned   all {counts['seen']} samples\n  usable    {usable} (" in printed
    reasons = [reason for reason in REASONS if reason in counts]
    lines = [
        line.removeprefix("  skipped   ").split(" (")[0]
        for line in printed.splitlines()
        if line.startswith("  skipped")
    ]
    assert lines == [f"{counts[reason]} {reason}" for reason in reasons]
    assert "too many: training stops above run.max_bad_fraction=0.05" in printed


def test_records_of_a_folder_are_counted_once_each(look):
    for number in (1, 2, 3):
        (look.folder / f"align/image/{number}.jpg").unlink()
    (look.folder / "align/image/4.jpg").write_bytes(b"no image")
    printed = look(2)
    assert "all 6 samples\n  usable    2 (33.3%)\n  skipped   3 missing_file (50.0%)\n" in printed
    assert "  skipped   1 bad_image (16.7%)\n" in printed and "(2 samples)\n" in printed


def test_unusable_datasets_are_reported_and_the_others_shown(look):
    for number in range(2):
        write_tar(
            look.folder / f"laion/{number:05d}.tar",
            {"0": FAULTS["no_caption"], "1": FAULTS["no_caption"]},
        )
    printed = look(1, expect=1)
    assert (
        "  stopped   laion: 4 of the first 4 samples had no 'jpg' + 'json' pair (first keys: jpg)"
        in printed
    )
    assert printed.endswith("(8 samples)\n")


def test_missing_shards_are_counted_and_named(look):
    (look.folder / "laion/00001.tar").unlink()
    printed = look(1, expect=1)
    assert f"  shards    1 found, 1 missing (first: {look.folder}/laion/00001.tar)\n" in printed
    assert (
        "scanned   all 4 samples\n  usable    4 (100.0%)\n" in printed
        and "bad_shard" not in printed
    )
    assert (
        "train.py would not start yet:\n  datasets.laion.build_info.storage: 1 of 2 shards are missing (first missing: "
        in printed
    )
    assert look.output.is_file()


def refusals(look, *arguments):
    """Return the problems that train.py reports for the arguments of an inspection."""
    args = inspect.parse_args(arguments)
    with pytest.raises(ConfigError) as caught:
        Config(args, for_training=True)
    return caught.value.problems


def test_missing_data_is_part_of_the_one_report_of_problems(look):
    for number in range(2):
        (look.folder / f"laion/{number:05d}.tar").unlink()
    printed = look(1, "model.ckpt=absent.pth", expect=2)
    assert printed.startswith("2 problems in the configuration:\n") and not look.output.exists()
    assert (
        "datasets.laion.build_info.storage: no file matches" in printed
        and "model.ckpt: no file at 'absent.pth'" in printed
    )
    (look.folder / "align/filter_cap.json").unlink()
    assert "datasets.cc_sbu_align.build_info.storage: '" in look(2, expect=2)


def test_mistakes_are_reported_as_train_py_reports_them(look):
    wrong = [
        "run.max_epohc=2",
        "model.max_txt_len=many",
        "datasets.laion.build_info.storage=/none/00000.tar",
    ]
    printed = look(1, *wrong, expect=2)
    options = ["--options", f"model.llama_model={FOLDER}/model/llama", *wrong]
    options += [f"datasets.cc_sbu.build_info.storage={look.folder}/cc_sbu/00000.tar"]
    problems = refusals(look, "--cfg-path", "train_configs/embedded_stage1_pretrain.yaml", *options)
    assert len(problems) == 3 and sorted(printed.splitlines()[1:]) == sorted(
        f"  {problem}" for problem in problems
    )


def test_the_shipped_files_name_the_keys_to_set(look):
    printed = look.run("train_configs/minigpt4_stage1_pretrain.yaml", expect=2)
    assert (
        "datasets.laion.build_info.storage: '/path/to/" in printed
        and "is the placeholder" in printed
    )


# downloads


def test_failed_downloads_are_reported(look):
    stats = {"count": 10, "successes": 4, "failed_to_download": 5, "failed_to_resize": 1}
    stats["status_dict"] = {"success": 4, "HTTP Error 404: Not Found": 5, "image decoding error": 1}
    for number in range(2):
        (look.folder / f"laion/{number:05d}_stats.json").write_text(json.dumps(stats))
    laion, cc_sbu = look(1).split("\ncc_sbu\n")
    assert "  download  8 of 20 images (40.0%) in 2 finished shards\n" in laion
    lines = [" ".join(line.split()) for line in laion.splitlines()]
    assert {"10 failed to download", "2 no image", "10 HTTP Error 404: Not Found"} < set(lines)
    assert "scanned   all 8 samples" in laion and "no statistics of img2dataset" in cc_sbu
    (look.folder / "laion/00000_stats.json").write_text("{")
    assert (
        f"  download  {look.folder}/laion/00000_stats.json: no statistics of img2dataset (JSONDecodeError"
        in look(1)
    )


# the command


def test_help_answers_without_torch():
    probe = "import sys, runpy\nsys.argv = ['inspect', '--help']\ntry:\n    runpy.run_module('minigpt4.datasets.inspect'"
    probe += ", run_name='__main__')\nexcept SystemExit:\n    print('torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert printed.startswith("usage: python -m minigpt4.datasets.inspect") and printed.endswith(
        "False\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--num", "0"], ["--num", "x"], ["--num", "401"], ["--scan", "0"]]
)
def test_numbers_out_of_range_are_rejected(arguments, capsys):
    with pytest.raises(SystemExit):
        inspect.parse_args(["--cfg-path", "a.yaml", *arguments])
    assert f"'{arguments[1]}' is no whole number from 1" in capsys.readouterr().err


def test_another_output_format_is_rejected_with_an_explanation(capsys):
    with pytest.raises(SystemExit):
        inspect.parse_args(["--cfg-path", "a.yaml", "--output", "a.txt"])
    assert (
        "--output: 'a.txt'; the sheet is an HTML page, give a name that ends in .html"
        in capsys.readouterr().err
    )


def test_scripts_that_ask_for_a_png_get_the_page_beside_it(capsys):
    assert inspect.parse_args(["--cfg-path", "a.yaml", "--output", "b/a.png"]).output == Path(
        "b/a.html"
    )
    assert "the sheet is an HTML page, written to 'b/a.html'" in capsys.readouterr().err


def test_held_out_samples_are_reported(look):
    printed = look(1, "datasets.laion.val_fraction=0.5")
    found = re.search(
        r"laion\n.*all (\d) samples\n  usable    (\d) .*\n  held out  (\d) for the validation",
        printed,
    )
    assert found[1] == found[2] == str(8 - int(found[3])) and 0 < int(found[3]) < 8


def test_the_sheet_is_named_after_the_configuration():
    assert inspect.parse_args(["--cfg-path", "configs/my.yaml"]).output == Path("my_inspect.html")
    assert inspect.parse_args(["--cfg-path", "configs/my.yaml", "--scan", "all"]).scan is None


def test_a_missing_output_folder_is_reported_before_the_scan(look):
    look.output = look.folder / "absent/sheet.html"
    printed = look(1, expect=1)
    assert printed.startswith("error: --output: no folder '") and "scanned" not in printed


def test_inspect_needs_no_ranks_no_llm_weights_and_no_output_folder(look, tmp_path, monkeypatch):
    for name, value in {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((FOLDER / "model/llama" / name).read_bytes())
    (tmp_path / "file").touch()
    printed = look(2, f"model.llama_model={tokenizer}", f"run.output_dir={tmp_path}/file/out")
    assert "usable    6 (100.0%)" in printed
    for missing in (
        "run.dist_url: env://",
        "run.output_dir: ",
        f"model.llama_model: '{tokenizer}' has no weights",
    ):
        assert missing in printed.split("train.py would not start yet:")[1]
    # but it needs the tokenizer
    (tokenizer / "tokenizer.json").unlink()
    look(2, f"model.llama_model={tokenizer}", expect=2)
