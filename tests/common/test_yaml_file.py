"""A YAML file is read once; errors in its text name key and line, and no text exhausts time or memory."""

from argparse import Namespace

import pytest

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.yaml_file import read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9)
)
WRONG = {
    "a key twice": (
        "run:\n  seed: 1\n  log_freq: 5\n  seed: 2\nmodel: {}\n",
        "run.seed: stands twice, in lines 2 and 4; keep one of them (c.yaml)",
    ),
    "a section twice": (
        "run: {}\nmodel: {}\nrun: {}\n",
        "run: stands twice, in lines 1 and 3; keep one of them (c.yaml)",
    ),
    "a key twice in a list": (
        "imports:\n- {a: 1,\n   a: 2}\n",
        "imports.0.a: stands twice, in lines 2 and 3; keep one of them (c.yaml)",
    ),
    "a tab": (
        "run:\n\tseed: 1\n",
        "--cfg-path: '{}' is not valid YAML in line 2; a tab stands there, indent with spaces",
    ),
    "UTF-16": ("run: {}\n".encode("utf-16"), "--cfg-path: '{}' is UTF-16 text; save it as UTF-8"),
    "Latin-1": (
        "run: {seed: ü}".encode("latin-1"),
        "--cfg-path: '{}' is not UTF-8 text; give a YAML file",
    ),
    "aliases without measure": (
        BOMB,
        "--cfg-path: '{}' holds more than 50,000 values, once its aliases are filled in",
    ),
    "an alias within itself": (
        "a: &a [*a]",
        "--cfg-path: '{}' holds more than 50,000 values, once its aliases are filled in",
    ),
    "nested": ("a: " + "[" * 60 + "]" * 60, "--cfg-path: '{}' is nested more than 40 levels deep"),
    "nested without end": (
        "a: " + "[" * 9000,
        "--cfg-path: '{}' is nested more than 40 levels deep",
    ),
    "a number of 5000 digits": (
        "run:\n  seed: " + "9" * 5000,
        "--cfg-path: '{}' has a number of 5,000 digits in line 2; write a smaller one",
    ),
    "as large as weights": (
        b"#" * 2**20 + b"\n",
        "--cfg-path: '{}' is larger than 1 MiB; give a YAML file of settings",
    ),
    "a list": ("- run\n", "--cfg-path: '{}' holds no sections; expected env, model, datasets, run"),
    "a word": ("run", "--cfg-path: '{}' holds no sections; expected env, model, datasets, run"),
    "half an interpolation": (
        "run: {seed: '${x'}",
        "--cfg-path: '{}' cannot be used: run.seed: no viable alternative at input '${x'",
    ),
    "code": (
        "run: !!python/object/apply:os.system [id]",
        "--cfg-path: '{}' is not valid YAML in line 1; tags such as !name are not read",
    ),
    "a path of Windows in double quotes": (
        'run:\n  output_dir: "C:\\data"',
        "--cfg-path: '{}' is not valid YAML in line 2; a backslash in double quotes begins an escape sequence; write "
        "'/', or use single quotes",
    ),
    "two documents": (
        "run: {}\n---\nmodel: {}\n",
        "--cfg-path: '{}' is not valid YAML in line 2; one document is read, remove '---'",
    ),
    "a null byte": (
        b"run: \0",
        "--cfg-path: '{}' is not valid YAML: unacceptable character #x0000: special characters are not allowed; "
        "look at brackets, quotes, indentation",
    ),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_file_is_said_by_line(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert list(map(str, caught.value.problems)) == [message.replace("{}", str(path))]


def test_what_windows_editors_write_is_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfrun:\r\n  init_lr: 1e-4\r\n  base: &b {seed: 1}\r\n  more: {<<: *b, x: 2}\r\n"
    )
    content, lines = read_yaml(path)
    assert content == {"run": {"init_lr": 1e-4, "base": {"seed": 1}, "more": {"x": 2, "seed": 1}}}
    assert lines["run.init_lr"] == 2 and lines["run.more.x"] == 4


NO_SECTION = [
    ("run", "3", "3 (int)"),
    ("run", "[1]", "[1] (list)"),
    ("model", "text", "'text' (str)"),
    ("datasets", "[laion]", "['laion'] (list)"),
    ("datasets.laion", "7", "7 (int)"),
    ("datasets.laion", "[x]", "['x'] (list)"),
    ("env", "true", "True (bool)"),
]
NO_MAPPING = [
    ("datasets.laion.build_info", "5", "5 (int) is not a mapping with storage"),
    ("datasets.laion.build_info", "null", "null is not a mapping with storage"),
    ("datasets.laion.vis_processor", "[a]", "['a'] (list) is not a mapping with train, eval"),
    ("datasets.laion.vis_processor.train", "x", "'x' (str) is not a dict or null"),
    ("run.train_splits", "{a: 1}", "{'a': 1} (dict) is not a list"),
    ("run.seed", "null", "null is not an integer"),
    ("run.init_lr", ".nan", "nan is out of range"),
    ("run.init_lr", "1e999", "inf is out of range"),
    ("run.batch_size_train", "99999999999999999999", "99999999999999999999 is out of range"),
]
NO_SECTION = [
    (key, text, f"{found} is no section; write its keys below it, as `key: value`")
    for key, text, found in NO_SECTION
]


@pytest.mark.parametrize("key, text, message", NO_SECTION + NO_MAPPING)
def test_sections_that_are_none_are_lines_of_the_report(key, text, message, tmp_path):
    """The same holds in the file and in the options."""
    path = tmp_path / "c.yaml"
    for in_file in (True, False):
        body = f"{text}\n"
        for name in reversed(key.split(".")):
            body = f"{{{name}: {body.strip()}}}\n"
        path.write_text(body if in_file else "{}\n")
        with pytest.raises(ConfigError) as caught:
            Config(
                Namespace(cfg_path=path, options=[] if in_file else [f"{key}={text}"]),
                for_training=True,
            )
        (problem,) = [problem for problem in caught.value.problems if problem.key == key]
        assert problem.message == message
        assert problem.place == ("c.yaml line 1" if in_file else "--options")


@pytest.mark.parametrize("option", ["=3", "run.=3", ".seed=3", "run..seed=3"])
def test_an_option_without_a_key_is_refused(option, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {arch: none}\n")
    with pytest.raises(
        ConfigError,
        match=rf"--options: '{option[:-2]}' is no key; write every item as SECTION.KEY=VALUE",
    ):
        Config(Namespace(cfg_path=tmp_path / "c.yaml", options=[option]))
