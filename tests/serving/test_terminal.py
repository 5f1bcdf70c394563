"""The command line of demo.py, and its chat in the terminal, driven by a keyboard and by pipes."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.demo import parse_args
from minigpt4.serving.terminal import Terminal
from tests.conversation.conftest import chat, golden_model, vis_processor  # noqa: F401
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
    assert result.returncode == 1, result.stderr  # some lines are mistakes
    output, loading = result.stdout, result.stderr
    assert (
        loading.index("Initializing Chat")
        < loading.index("Initialization Finished")
        < loading.index("error: ")
    )
    assert output.startswith("0 question(s) saved") and "Prompt Example" not in output + loading
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    says = [
        f"image '{tmp_path / 'bad.png'}'",
        "temperature: -1",
        "no setting 'speed'",
        "'x' is no number",
        "unknown command '/dance'",
    ]
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


class Keyboard:
    """A Terminal in a forked process behind a pseudo-terminal: what is typed into it, and what it shows."""

    def __init__(self, chat, folder):  # noqa: F811
        self.seen = ""
        self.process, self.screen = pty.fork()
        if not self.process:
            try:
                # a test run in the background ignores it
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ["TERM"] = "xterm"
                os.chdir(folder)
                sys.stdin, sys.stdout, sys.stderr = (
                    open(number, mode)  # noqa: SIM115
                    for number, mode in enumerate("rww")
                )
                os._exit(Terminal(chat, CONV_VISION, temperature=0, max_new_tokens=6).run())
            finally:
                traceback.print_exc()
                os._exit(3)

    def type(self, text):
        os.write(self.screen, text.encode())

    def read_until(self, text, seconds=30):
        """Return what was shown up to `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            left = max(deadline - time.monotonic(), 0)
            assert select.select([self.screen], [], [], left)[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.screen, 4096).decode(errors="replace")
        before, self.seen = self.seen.split(text, 1)
        return before

    def end(self):
        """Return the exit code; whatever is still shown is read, so that nothing waits for room."""
        while True:
            try:
                if not os.read(self.screen, 4096):
                    break
            except OSError:  # how Linux says that the other side is closed
                break
        os.close(self.screen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def keyboard(chat, tmp_path):  # noqa: F811
    """A terminal in a folder of its own, whose answers come at a token in 50 ms."""

    def slowly(ids, scores):
        time.sleep(0.05)
        return [False] * len(ids)

    keyboard = Keyboard(
        type(chat)(chat.model, chat.vis_processor, stopping_criteria=[slowly]), tmp_path
    )
    yield keyboard
    with suppress(ProcessLookupError):
        os.kill(keyboard.process, signal.SIGKILL)


def dialogue(path):
    return [turn["question"] for turn in json.loads(path.read_text())["turns"]]


def test_the_keyboard_edits_remembers_completes_and_pastes(keyboard, tmp_path):
    picture(1).save(tmp_path / "an image.png")
    (tmp_path / "folder").mkdir()
    keyboard.read_until("/image PATH shows an image")
    keyboard.read_until("> ")
    keyboard.type("/im\tan\t\r")  # Tab completes the command, then the name with its space
    keyboard.read_until("an image.png: received")
    keyboard.read_until("> ")
    # a letter taken back, and words put at the beginning of the line
    keyboard.type("what iss\x7f\x01so \r")
    keyboard.read_until("> ")
    keyboard.type("\x1b[A\x05?\r")  # the line before, with something behind it
    keyboard.read_until("> ")
    keyboard.type("\x1b[200~one\ntwo\n\tthree\x1b[201~\r")  # pasted
    keyboard.read_until("> ")
    keyboard.type('"""a\rb"""\r')
    keyboard.read_until("> ")
    keyboard.type("/save fo\tsaved.json\r")
    keyboard.read_until("saved to folder/saved.json")
    assert dialogue(tmp_path / "folder/saved.json") == [
        "so what is",
        "so what is?",
        "one\ntwo\n\tthree",
        "a\nb",
    ]
    keyboard.read_until("> ")
    keyboard.type('"""half\r')
    keyboard.read_until(". ")
    keyboard.type("\x04")
    keyboard.read_until('that """ began was never ended')
    keyboard.read_until("> ")
    keyboard.type("/dance\r")
    keyboard.read_until("error: unknown command '/dance'")
    keyboard.read_until("> ")
    keyboard.type("\x04")
    assert keyboard.end() == 0  # a mistake at a keyboard is no failure


def test_ctrl_c_stops_the_answer_not_the_program(keyboard, tmp_path):
    """While an answer comes, at the prompt, within a message of several lines; then Ctrl-D."""
    keyboard.read_until("> ")
    keyboard.type("/set max_new_tokens 400\r")
    keyboard.read_until("400")
    keyboard.read_until("> ")
    keyboard.type("tell me everything\r")
    keyboard.read_until("everything")
    keyboard.read_until("e")  # the answer has begun
    keyboard.type("\x03")
    assert len(keyboard.read_until("[stopped]", 5)) < 500
    for typed in ("half a line", '"""a\rb'):
        keyboard.read_until("> ")
        keyboard.type(typed)
        keyboard.read_until(typed[-1])
        time.sleep(0.2)  # `input` misses a signal between its prompt and its read
        keyboard.type("\x03")
        keyboard.read_until("/quit or Ctrl-D leaves", 5)
    keyboard.read_until("> ")
    keyboard.type("/save a.json\r")
    keyboard.read_until("1 question(s) saved")
    keyboard.read_until("> ")
    keyboard.type("\x04")
    assert keyboard.end() == 0
    assert dialogue(tmp_path / "a.json") == ["tell me everything"]


class Pipe(io.StringIO):
    """Standard input that is no terminal."""

    def reconfigure(self, **_):
        pass


def through_pipe(chat, monkeypatch, text):  # noqa: F811
    monkeypatch.setattr(sys, "stdin", Pipe(text))
    return Terminal(chat, CONV_VISION, temperature=0, max_new_tokens=3).run()


def test_the_exit_code_of_a_pipe_tells_of_mistakes(chat, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert (
        through_pipe(
            chat, monkeypatch, 'what is it?\n\n"""a\n\n b"""\n/save a.json\n/quit\n/dance\n'
        )
        == 0
    )
    assert dialogue(tmp_path / "a.json") == ["what is it?", "a\n\n b"]
    assert capsys.readouterr().err == ""
    for text, says in [
        ("/image nowhere.png\nwhat is it?\n", "no file 'nowhere.png'"),
        ("/image\n", "/image: give the path"),
        (f"/image {tmp_path}\n", f"image '{tmp_path}': a folder; expected an image"),
        ("/dance", "unknown command '/dance'"),
        ('"""a\nb', 'the message that """ began was never ended'),
        ("x" * 10**5, "the message has 100,000 characters"),
    ]:
        assert through_pipe(chat, monkeypatch, text) == 1
        assert f"error: {says}" in capsys.readouterr().err.replace("image: no", "no")


def test_names_of_files_as_terminals_write_them(chat, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"an image \xe9.png")
    picture(1).save("a.png")
    os.rename("a.png", name)
    typed = [name, f"'{name}'", name.replace(" ", "\\ "), f'"{tmp_path}/{name}"']
    text = "".join(f"/image {each}\n" for each in typed)
    assert through_pipe(chat, monkeypatch, f"{text}what?\n/save a b.json\n") == 0
    assert [
        os.path.basename(path)
        for path in json.loads(Path("a b.json").read_text())["turns"][0]["pictures"]
    ] == [name] * 4


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
    assert (args.server_name, args.share, args.auth, args.options) == (
        "127.0.0.1",
        False,
        None,
        None,
    )
    assert parse_args([*CONFIG, "--share", "--auth", "me:a:b"]).share
    for given, expected in [
        ([], ['model.ckpt="x.pth"']),
        (["--options", "run.seed=1"], ["run.seed=1", 'model.ckpt="x.pth"']),
        (["--options", "run.seed", "1"], ["run.seed", "1", "model.ckpt", '"x.pth"']),
    ]:
        assert parse_args([*CONFIG, "--checkpoint", "x.pth", *given]).options == expected


def test_a_wrong_configuration_is_reported_before_anything_is_loaded(release):
    result = run(release, [], **{"model.ckpt": "absent.pth", "model.vit_model": "x"})
    assert result.returncode == 2 and result.stderr.startswith("2 problems in the configuration"), (
        result.stderr
    )


def test_help_needs_neither_torch_nor_gradio():
    probe = (
        "import sys, runpy\nsys.argv = ['demo.py', '--help']\n"
        "try:\n    runpy.run_path('demo.py', run_name='__main__')\n"
        "except SystemExit:\n    print([name in sys.modules for name in ('torch', 'gradio')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--cfg-path" in result.stdout and result.stdout.endswith("[False, False]\n")
