"""evaluate.py: what it writes, how it resumes, and its messages for a wrong command line."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt4.evaluate import evaluate, find_images, parse_args
from minigpt4.evaluation.answer_file import open_answers
from tests.small_release import picture

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ask(release, tmp_path, capsys, monkeypatch):
    """Call evaluate.py in this process; return the records of its output file and what it printed."""
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    monkeypatch.chdir(ROOT)
    settings = {
        "model.ckpt": release.checkpoint,
        "model.low_resource": False,
        "model.llm_precision": "fp32",
    }
    output = tmp_path / "answers.jsonl"

    def run(*arguments, **changes):
        config = [
            "--cfg-path",
            "eval_configs/minigpt4_eval.yaml",
            *release.options(**settings | changes),
        ]
        shared = [
            "--device",
            "cpu",
            "--output",
            str(output),
            *([] if "--max-new-tokens" in arguments else SHORT),
        ]
        evaluate(parse_args([*config, *shared, *map(str, arguments)]))
        lines = output.read_bytes().decode().split("\n")
        assert lines.pop() == ""
        return [json.loads(line) for line in lines], capsys.readouterr().out

    run.output = output
    return run


PROCESSOR = "datasets.cc_sbu_align.vis_processor.train.name"
SHORT = ["--max-new-tokens", "4"]


def test_a_partial_last_line_is_removed_and_other_files_are_refused(tmp_path):
    output = tmp_path / "answers.jsonl"
    whole = '{"image": "a.jpg", "answer": "one\u2028two\x85 caf\u00e9"}\n'.encode()
    # cut within a multi-byte character
    output.write_bytes(whole + '{"image": "b.jpg", "answer": "caf\u00e9'.encode()[:-1])
    with open_answers(output, "image", {}) as file:
        assert file.done == {"a.jpg"}
        file.begin(set())
    assert output.read_bytes() == whole
    for other in (
        b"notes",
        b"notes\n",
        b'{"caption": "x"}\n',
        b'{"image": 7}\n',
        b"[" * 10**5 + b"\n",
        b"\xff\n",
    ):
        output.write_bytes(other)
        with (
            pytest.raises(ValueError, match="is no answer file"),
            open_answers(output, "image", {}),
        ):
            pass
        assert output.read_bytes() == other
    with pytest.raises(ValueError, match="is no file"), open_answers(tmp_path, "image", {}):
        pass


def test_a_full_disk_leaves_complete_lines_and_a_message_with_advice(tmp_path):
    """A limit on the file size simulates the full disk: it is reached within a character of the second line."""
    path = tmp_path / "answers.jsonl"
    line = {"image": "a.jpg", "answer": "\u00e9" * 2000}
    with open_answers(path, "image", {"prompt": "x"}) as file:
        file.begin(set())
        file.add(line)
        size = path.stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1001, before[1]))
        try:
            with pytest.raises(
                OSError,
                match=r"--output: '.*answers.jsonl' cannot be written .*make room and call again",
            ):
                file.add({**line, "image": "b.jpg"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == [line]


def test_a_second_call_on_one_output_is_refused(tmp_path):
    code = (
        "import sys, pathlib; from minigpt4.evaluation.answer_file import open_answers\n"
        "with open_answers(pathlib.Path(sys.argv[1]), 'image', {}): pass"
    )
    with open_answers(tmp_path / "answers.jsonl", "image", {}):
        other = [sys.executable, "-c", code, str(tmp_path / "answers.jsonl")]
        result = subprocess.run(other, capture_output=True, text=True, cwd=ROOT)
    assert (
        result.returncode == 1
        and f"answers.jsonl' is being written by process {os.getpid()}" in result.stderr
    )
    assert subprocess.run(other, cwd=ROOT).returncode == 0


def test_file_names_that_are_not_utf8_are_recognised_when_resuming(ask, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    names = [b"\xe9.png", "caf\u00e9\u2028.png".encode(), b"z\n.png"]
    for name in names:
        picture(1).save(folder / "a.png")
        os.rename(folder / "a.png", os.fsencode(folder) + b"/" + name)
    records = ask("--images", folder)[0]
    assert {os.path.basename(os.fsencode(record["image"])) for record in records} == set(names)
    assert all(os.path.isfile(record["image"]) and "answer" in record for record in records)
    assert "0 answers added" in ask("--images", folder)[1]


def test_an_output_of_another_question_checkpoint_or_setting_is_refused(ask, release, tmp_path):
    picture(1).save(tmp_path / "a.png")
    images = ["--images", tmp_path / "a.png"]
    ask(*images)
    before = ask.output.read_bytes()
    other, llm = tmp_path / "other.pth", tmp_path / "llm"
    content = torch.load(release.checkpoint)
    content["model"]["llama_proj.weight"] *= 2
    torch.save(content, other)
    shutil.copytree(release.llama, llm)
    (llm / "model.safetensors").write_bytes(
        (release.llama / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0"
    )
    for arguments, changes, says in [
        (
            ["--prompt", "Which colour?"],
            {},
            "prompt: 'Describe this image in detail.' there, 'Which colour.' now",
        ),
        (["--temperature", "0.5"], {}, "temperature: 0.0 there, 0.5 now"),
        (["--max-new-tokens", "5"], {}, "max_new_tokens: 4 there, 5 now"),
        (
            [],
            {"model.ckpt": other},
            "model.ckpt: {'name': 'prerained_minigpt4_7b.pth', .* {'name': 'other.pth', .* now",
        ),
        (
            [],
            {"model.llama_model": llm},
            "model.llama_model: {'name': 'vicuna', .* there, {'name': 'llm', .* now",
        ),
        ([], {PROCESSOR: "blip2_image_train"}, "image processor: .*_eval'.*_train'"),
        ([], {"model.end_sym": "</s>"}, "model.end_sym: '###' there, '</s>' now"),
    ]:
        with pytest.raises(
            ValueError, match=f"answers.jsonl' holds 1 answers to something else .*{says}"
        ):
            ask(*images, *arguments, **changes)
        assert ask.output.read_bytes() == before
    # Settings that change no answer may differ: another name of the same weights, or a setting of training.
    same = shutil.copy(release.checkpoint, tmp_path / "renamed.pth")
    assert "0 answers added" in ask(*images, **{"model.ckpt": same, "model.max_txt_len": 7})[1]


def test_a_line_without_an_answer_is_tried_again(tmp_path):
    """Also in a file of another program. The file is written through a symbolic link, which is kept."""
    path, link = tmp_path / "answers.jsonl", tmp_path / "link.jsonl"
    path.write_text(
        '{"image": "a"}\n{"image": "b", "answer": null}\n{"image": "c", "answer": ""}\n'
    )
    link.symlink_to(path)
    with open_answers(link, "image", {}) as file:
        assert file.done == {"c"}
        file.begin({"a", "b"})
    assert link.is_symlink() and path.read_text() == '{"image": "c", "answer": ""}\n'


def test_an_output_without_a_settings_file(tmp_path, caplog):
    """An earlier version wrote none: the file is resumed with a warning. A damaged settings file is refused."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"image": "a.jpg", "answer": "one"}\n')
    with open_answers(path, "image", {"prompt": "x"}) as file:
        assert file.done == {"a.jpg"} and "has no settings file beside it" in caplog.text
    for content in ("", "[]", "{", "[" * 10**5, "7"):
        (tmp_path / "answers.jsonl.settings.json").write_text(content)
        with (
            pytest.raises(ValueError, match=r"settings.json' is damaged"),
            open_answers(path, "image", {"prompt": "x"}),
        ):
            pass


def test_what_the_chat_would_refuse_is_refused_before_the_model_is_loaded(ask, tmp_path):
    picture(1).save(tmp_path / "a.png")
    for arguments, says in [
        (["--prompt", " \n"], "--prompt: the message is empty"),
        (["--prompt", "x" * 10**5], "--prompt: the message has 100,000 characters; at most"),
        (["--temperature", "-1"], "temperature: -1"),
        (["--max-new-tokens", "0"], "max_new_tokens: 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            ask("--images", tmp_path / "a.png", *arguments)
    assert not ask.output.exists()


def test_every_image_is_found_once(tmp_path, monkeypatch):
    """Through links, in folders named like images, and however the path is written."""
    monkeypatch.chdir(tmp_path)
    for place in (
        "all/a.PNG",
        "all/sub/b.gif",
        "all/c.jpg/d.bmp",
        "elsewhere/e.jpeg",
        "far/x/f.png",
        "g.png",
        "all/._a.png",
    ):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "all/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all/round").symlink_to(tmp_path / "all")
    (tmp_path / "link").symlink_to(tmp_path / "far/x")
    (tmp_path / "far/g.png").write_bytes(b"")
    found = ["all/a.PNG", "all/c.jpg/d.bmp", "all/more/e.jpeg", "all/sub/b.gif"]
    assert (
        find_images(["all"])
        == find_images(["./all/", "all/sub/../a.PNG", str(tmp_path / "all/a.PNG")])
        == found
    )
    # far/g.png is a different image
    assert find_images(["link/../g.png", "g.png"]) == ["link/../g.png", "g.png"]
    with pytest.raises(FileNotFoundError, match="--images: no image at 'far/y'"):
        find_images(["far/y"])


@pytest.mark.parametrize(
    "option", ["--max-new-tokens 300", "--temperature 0", "--batch-size 8", "--prompt x"]
)
@pytest.mark.parametrize("what", ["--tasks pope --cfg-path a.yaml", "--compare a.json b.json"])
def test_an_option_for_images_is_refused_elsewhere_also_with_its_default(what, option, capsys):
    with pytest.raises(SystemExit):
        parse_args([*what.split(), *option.split()])
    assert f"{option.split()[0]} is for --images" in capsys.readouterr().err
    args = parse_args(["--images", "a.png", "--cfg-path", "a.yaml", *option.split()])
    given = {"max_new_tokens": 300, "temperature": 0, "batch_size": 8}
    assert {name: getattr(args, name) for name in given} == given


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    command = [
        sys.executable,
        "evaluate.py",
        "--cfg-path",
        "eval_configs/embedded_eval.yaml",
        "--images",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert (
        result.stderr.startswith(f"error: --images: no image at '{tmp_path}'")
        and "Traceback" not in result.stderr
    )


def test_each_image_gets_a_line_once_and_an_error_is_tried_again(ask, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "bad.png").write_text("no image")
    first, said = ask("--images", folder / "1.png")
    assert said.endswith(f"1 answers added to {ask.output}, 0 were there\n")
    records, said = ask("--images", folder, "--batch-size", "2")
    assert (
        said.endswith(f"3 answers added to {ask.output}, 1 were there\n")
        and "1 images have an error" in said
    )
    assert records[:1] == first and ask("--images", folder)[0] == records
    assert [record["image"] for record in records] == [
        str(folder / f"{name}.png") for name in (1, 0, 2, "bad")
    ]
    assert [list(record) for record in records] == [["image", "answer"]] * 3 + [["image", "error"]]
    assert f"image '{folder / 'bad.png'}'" in records[3]["error"]
    assert ask("--images", folder / "0.png")[0] == records  # nobody asked about the bad one
    picture(3).save(folder / "bad.png")
    again, said = ask("--images", f"{folder}/../images")  # the same images
    assert (
        said.endswith(f"1 answers added to {ask.output}, 3 were there\n")
        and again[:3] == records[:3]
    )
    assert list(again[3]) == ["image", "answer"]
