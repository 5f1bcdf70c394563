"""`--options`: nothing is dropped, a `#` is text, both spellings work."""

import pytest
from omegaconf import OmegaConf

from minigpt4 import demo, train
from minigpt4.common.config_report import ConfigError, Report
from minigpt4.common.config_values import apply_options


def applied(*options, user=None):
    user = OmegaConf.create(user or {"run": {"max_epoch": 4}})
    report = Report()
    apply_options(user, options, report)
    return OmegaConf.to_container(user), [str(problem) for problem in report.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3e-5", 3e-5),
        ("False", False),
        ("null", None),
        ("[train,val]", ["train", "val"]),
        ("/a=b", "/a=b"),
        ("###", "###"),
        ("'###'", "###"),
        ("###Human: {} ###Assistant: ", "###Human: {} ###Assistant: "),
        ("", ""),
        ("42", 42),
        ("a: b", {"a": "b"}),
    ],
)
def test_values_are_read_as_yaml_and_a_hash_is_text(text, value):
    for options in ([f"run.key={text}"], ["run.key", text]):
        found, problems = applied(*options)
        assert found["run"]["key"] == value and not problems


def test_pairs_and_dotlist_reach_new_and_old_keys():
    assert applied("run.max_epoch", "7", "model.ckpt", "x")[0] == {
        "run": {"max_epoch": 7},
        "model": {"ckpt": "x"},
    }
    assert applied("run.max_epoch=7", "model.ckpt=x")[0] == {
        "run": {"max_epoch": 7},
        "model": {"ckpt": "x"},
    }


def test_a_list_element_can_be_set():
    found, problems = applied("run.train_splits.0=val", user={"run": {"train_splits": ["train"]}})
    assert found["run"]["train_splits"] == ["val"] and not problems


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["run.max_epoch"], "--options: 'run.max_epoch' has no value; write run.max_epoch=VALUE"),
        (
            ["run.max_epoch", "7", "run.seed"],
            "--options: 'run.seed' has no value; write run.seed=VALUE",
        ),
        (
            ["run.seed=1", "run.max_epoch", "7"],
            "--options: 'run.max_epoch' has no '='; write every item as KEY=VALUE",
        ),
    ],
)
def test_nothing_is_dropped_silently(options, problem):
    assert problem in applied(*options)[1]


PATHS = [
    "2026_11",
    "012",
    "1e3",
    "yes",
    "out/a: b/c.pth",
    "[old]/c.pth",
    "a #b.pth",
    "ä\\'\".pth",
    "out/c.pth ",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_of_the_command_line_stays_as_it_is(path):
    args = train.parse_args(["--cfg-path", "x.yaml", "--resume", path])
    assert applied(*args.options)[0]["run"]["resume_ckpt_path"] == path
    args = demo.parse_args(["--cfg-path", "x.yaml", "--checkpoint", path])
    assert applied(*args.options)[0]["model"]["ckpt"] == path


@pytest.mark.parametrize("program, option", [(train, "--resume"), (demo, "--checkpoint")])
def test_an_empty_path_of_the_command_line_is_refused(program, option, capsys):
    """As of a variable of the shell that is not set; it would begin a new run."""
    with pytest.raises(SystemExit):
        program.parse_args(["--cfg-path", "x.yaml", option, ""])
    assert f"{option}: empty; give " in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["nan", "-3", "0", "inf"])
def test_a_gpu_has_some_memory(memory):
    args = train.parse_args(["--cfg-path", "x.yaml", "--dry-run", "--gpu-memory", memory])
    with pytest.raises(ValueError, match=f"--gpu-memory {memory}: plans for a GPU .* above 0"):
        train.train(args)


@pytest.mark.parametrize("options", [["run.max_epoch=2"], ["run.max_epoch", "2"]])
def test_what_a_program_adds_is_spelt_as_the_users_options(options):
    """As --gpu-memory does; the weights that the file names are not here."""
    command = ["--cfg-path", "train_configs/minigpt4_stage1_pretrain.yaml", "--dry-run"]
    args = train.parse_args([*command, "--gpu-memory", "24", "--options", *options])
    with pytest.raises(ConfigError) as error:
        train.train(args)
    assert "--options" not in str(error.value)
