"""The command line of demo.py, and its chat in the terminal, driven as people and pipes do."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from minigpt4.demo import parse_args
from tests.serving.server import ROOT, command
from tests.small_release import picture

CONFIG = ["--cfg-path", "eval_configs/minigpt4_eval.yaml"]


def run(release, lines, *arguments, **options):
    return subprocess.run(
        command(release, "--cli", *arguments, **options),
        input="\n".join(lines),
        cwd=ROOT,
        env=release.env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_dialogue_from_a_pipe(release, tmp_path):
    picture(1).save(tmp_path / "an image.png")
    (tmp_path / "bad.png").write_text("no image")
    saved = tmp_path / "dialogue.json"
    lines = [
        f"/save {tmp_path / 'first.json'}",
        "/set temperature 0",
        "/set max_new_tokens 8",
        f"/image '{tmp_path / 'an image.png'}'",
        f"/image {tmp_path / 'bad.png'}",
        "what is it? <ImageHere> ###Assistant: x",
        "",
        "and the water?",
        "/set temperature -1",
        "/set speed 3",
        "/set seed x",
        "/dance",
        "/save",
        f"/save {saved}",
        f"/save {tmp_path / 'absent' / 'x.json'}",
        "/reset",
        "hello é 🙂",
        "/save " + str(tmp_path / "second.json"),
        "/help",
    ]
    result = run(release, lines, "--gpu-id", "0", **{"run.device": "auto"})  # 2023's usual line
    assert result.returncode == 0, result.stderr
    output = result.stdout
    assert output.index("Initializing Chat") < output.index("Initialization Finished") < output.index("an image.png")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    says = ["image 'bad.png'", "temperature: -1", "no setting 'speed'", "'x' is no number", "unknown command '/dance'"]
    says += ["give a file name", "No such file or directory"]
    assert len(errors) == len(says), errors
    assert all(part in error for part, error in zip(says, errors, strict=True)), errors
    assert "Traceback" not in result.stderr
    dialogue = json.loads(saved.read_text())
    assert [turn["question"] for turn in dialogue["turns"]] == [lines[5], lines[7]]
    assert dialogue["turns"][0]["pictures"] == [str(tmp_path / "an image.png")]
    assert all(turn["answer"] and turn["answer"] in output for turn in dialogue["turns"])
    assert dialogue["settings"] == {"temperature": 0, "max_new_tokens": 8}
    assert json.loads((tmp_path / "first.json").read_text())["settings"] == {"temperature": 1.0}
    assert len(json.loads((tmp_path / "second.json").read_text())["turns"]) == 1
    assert "/image PATH" in output


def test_ctrl_c_stops_the_answer_not_the_program(roomy):
    """In a pseudo-terminal: Ctrl-C while an answer comes, Ctrl-C at the prompt, Ctrl-D."""
    screen, keyboard = pty.openpty()
    env = {**roomy.env, "TERM": "dumb"}
    program = subprocess.Popen(
        command(roomy, "--cli"),
        cwd=ROOT,
        env=env,
        stdin=keyboard,
        stdout=keyboard,
        stderr=keyboard,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    seen = ""

    def read_until(text, seconds=60):
        nonlocal seen
        deadline = time.monotonic() + seconds
        while text not in seen:
            assert select.select([screen], [], [], max(deadline - time.monotonic(), 0))[0], f"no {text!r} in {seen!r}"
            seen += os.read(screen, 4096).decode(errors="replace")
        seen = seen.split(text, 1)[1]

    def type_in(text):
        os.write(screen, text.encode())

    try:
        read_until("Initialization Finished")
        read_until("> ")
        type_in("/set temperature 0\n/set repetition_penalty 1.5\n/set max_new_tokens 1500\n")
        for _ in range(3):
            read_until("> ")
        type_in("tell me everything\n")
        read_until("everything")
        read_until("e")  # the answer has begun
        program.send_signal(signal.SIGINT)
        read_until("[stopped]", 5)
        read_until("> ")
        for _ in range(20):  # input() misses one between its prompt and its read
            program.send_signal(signal.SIGINT)
            if select.select([screen], [], [], 1)[0]:
                break
        read_until("/quit or Ctrl-D leaves", 5)
        type_in("/set max_new_tokens 5\n")
        read_until("> ")
        type_in("\x04")
        assert program.wait(20) == 0
    finally:
        program.kill()
        os.close(screen)
        os.close(keyboard)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--share"], "add --auth USER:PASS"),
        (["--share", "--auth", "name"], "expected USER:PASS"),
        (["--auth", ":secret"], "expected USER:PASS"),
        (["--auth", "name:"], "expected USER:PASS"),
        (["--gpu-id", "0", "--device", "cpu"], "not allowed with"),
        (["--gpu-id", "x"], "invalid int value"),
    ],
)
def test_arguments_that_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args([*CONFIG, *arguments])
    assert error.value.code == 2 and says in capsys.readouterr().err


def test_the_default_is_this_machine_only_and_checkpoint_is_an_option():
    args = parse_args(CONFIG)
    assert (args.server_name, args.share, args.auth, args.options) == ("127.0.0.1", False, None, None)
    assert parse_args([*CONFIG, "--share", "--auth", "me:a:b"]).share
    for given, expected in [
        ([], ["model.ckpt=x.pth"]),
        (["--options", "run.seed=1"], ["run.seed=1", "model.ckpt=x.pth"]),
        (["--options", "run.seed", "1"], ["run.seed", "1", "model.ckpt", "x.pth"]),
    ]:
        assert parse_args([*CONFIG, "--checkpoint", "x.pth", *given]).options == expected


def test_a_wrong_configuration_is_reported_before_anything_is_loaded(release):
    result = run(release, [], **{"model.ckpt": "absent.pth", "model.vit_model": "x"})
    assert result.returncode == 2 and result.stderr.startswith("2 problems in the configuration"), result.stderr


def test_help_needs_neither_torch_nor_gradio():
    probe = (
        "import sys, runpy\nsys.argv = ['demo.py', '--help']\n"
        "try:\n    runpy.run_path('demo.py', run_name='__main__')\n"
        "except SystemExit:\n    print([name in sys.modules for name in ('torch', 'gradio')])"
    )
    result = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--cfg-path" in result.stdout and result.stdout.endswith("[False, False]\n")
