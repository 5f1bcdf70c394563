"""A checkpoint folder: its path opens it everywhere; parts that do not match are refused with both identities."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import minigpt4
from minigpt4 import demo, evaluate, serve
from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.checkpoint_folder import opened
from minigpt4.common.registry import registry
from minigpt4.export import main
from minigpt4.exporting.opening import open_config
from tests.exporting.conftest import CFG_PATH
from tests.small_release import picture


@pytest.fixture
def skeleton(folders):
    """Return a function that reads the folder into a model without weights, as --dry-run and a starting run do."""

    def read(options=(), folder=folders.checkpoint):
        section = open_config(str(folder), options=list(options)).model_cfg
        model = registry.get_model_class(section.arch).skeleton(section, torch.float32)
        model.read_files(section)

    return read


def copied(folder, path):
    shutil.copytree(folder, path)
    return path


def test_load_gives_the_same_answer_as_yaml_and_checkpoint(folders, hub, options):
    answers = []
    for path, more in (
        (str(folders.checkpoint), []),
        (CFG_PATH, [*options, f"model.ckpt={hub.checkpoint}"]),
    ):
        chat, conv = minigpt4.load(path, more, device="cpu")
        images = []
        chat.upload_img(picture(1), conv, images)
        chat.ask("What is it?", conv)
        answers.append(chat.answer(conv, images, temperature=0, max_new_tokens=8)[1].tolist())
        assert chat.model.trained_text == ("###Human: {} ###Assistant: ", "###")
    assert answers[0] == answers[1] and len(answers[0]) == 8


@pytest.mark.parametrize("program", [demo, serve, evaluate])
def test_programs_need_nothing_but_its_path(folders, program, capsys):
    more = ["--images", "x.jpg"] if program is evaluate else []
    args = program.parse_args(["--checkpoint", str(folders.checkpoint), *more])
    path, options = opened(args)
    assert (
        path == folders.checkpoint / "config.yaml"
        and options[-1] == f'model.ckpt="{folders.checkpoint}"'
    )
    with pytest.raises(SystemExit):
        program.parse_args(["--checkpoint", str(folders.checkpoint / "model.safetensors"), *more])
    assert "or --checkpoint with a checkpoint folder" in capsys.readouterr().err


def test_the_next_stage_starts_from_it(folders, hub, options):
    section = open_config(str(folders.checkpoint), CFG_PATH, options).model_cfg
    assert section.ckpt == str(folders.checkpoint)
    model = registry.get_model_class(section.arch).from_config(section, device="cpu")
    saved = torch.load(hub.checkpoint, weights_only=True)["model"]
    assert torch.equal(model.llama_proj.weight, saved["llama_proj.weight"])


def test_another_llm_is_refused_with_both_identities(folders, hub, skeleton, tmp_path, caplog):
    other = copied(hub.llama, tmp_path / "other_llm")
    tensors = load_file(other / "model.safetensors")
    # The same tensors saved in another format are the same LLM.
    save_file(
        dict(reversed(tensors.items())),
        other / "model.safetensors",
        metadata={"format": "pt", "by": "another"},
    )
    skeleton([f"model.llama_model={other}"])
    tensors["lm_head.weight"] += 0.5
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        skeleton([f"model.llama_model={other}"])
    message = str(error.value)
    assert "was trained with another LLM (name vicuna" in message and "(name other_llm" in message
    # the weights file instead of the folder: used knowingly, with a warning
    weights = folders.checkpoint / "model.safetensors"
    with caplog.at_level(logging.WARNING):
        skeleton([f"model.llama_model={other}", f"model.ckpt={weights}"])


def test_damage_and_other_formats_are_named(folders, skeleton, tmp_path):
    folder = copied(folders.checkpoint, tmp_path / "damaged")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="one of the two was changed or damaged"):
        skeleton(folder=folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(
        CheckpointError, match=r"says \{'format': 'minigpt4-checkpoint', 'version': 2\}; expected"
    ):
        skeleton(folder=folder)


def test_code_that_a_folder_names_is_not_run(folders, tmp_path, monkeypatch, caplog):
    folder = copied(folders.checkpoint, tmp_path / "strange")
    (folder / "my_strange_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = folder / "config.yaml"
    config.write_text(f"imports: [my_strange_code, strange.my_strange_code]\n{config.read_text()}")
    for place in (folder, tmp_path):
        monkeypatch.chdir(place)
        open_config(str(folder))
    assert "names code of its own, ['my_strange_code', 'strange.my_strange_code']" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_only_what_belongs_to_a_folder_goes_into_exports_also_into_one_within_it(folders, tmp_path):
    folder = copied(folders.checkpoint, tmp_path / "own")
    (folder / "notes").mkdir()
    (folder / "notes/mine.txt").touch()
    assert main([str(folder), "--to", "hf", str(folder / "hf")]) == 0
    names = sorted(path.name for path in (folder / "hf/minigpt4").iterdir())
    assert names == ["config.yaml", "manifest.json"]
    assert main([str(folder), "--to", "checkpoint", str(folder / "again")]) == 0
    names = sorted(path.name for path in (folder / "again").iterdir())
    assert names == ["config.yaml", "manifest.json", "model.safetensors"]


def test_an_interrupted_copy_leaves_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(folders.checkpoint), "--to", "checkpoint", str(tmp_path / "copy")])
    assert not list(tmp_path.iterdir())


def test_options_go_into_the_copy_of_a_folder(folders, hub, tmp_path):
    llm = copied(hub.llama, tmp_path / "moved")
    command = [str(folders.checkpoint), "--to", "checkpoint", str(tmp_path / "copy")]
    assert main([*command, "--options", f"model.llama_model={llm}", "model.max_txt_len=9"]) == 0
    section = open_config(str(tmp_path / "copy")).model_cfg
    assert section.llama_model == str(llm) and section.max_txt_len == 9
