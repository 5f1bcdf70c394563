"""Config: problems named by key, problems of all sections at once, image sizes that follow the model."""

import pickle
from argparse import Namespace
from pathlib import Path

import pytest

from minigpt4.common.config import Config, ConfigError, Problem
from minigpt4.common.config_report import is_in
from minigpt4.common.device import DeviceError
from minigpt4.common.registry import registry
from minigpt4.common.utils import weights_problem
from minigpt4.datasets.builders import LaionBuilder
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD

RUN = "run: {lr_sched: linear_warmup_cosine_lr, init_lr: 1e-3, min_lr: 0, weight_decay: 0, max_epoch: 1, device: cpu, "
RUN += "batch_size_train: 2, num_workers: 0, iters_per_epoch: 1, output_dir: out}\n"
TRAIN = "vis_processor: {train: {name: blip2_image_train}}"


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a YAML text, with a section `model` whose files exist."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "vit.pth", "blip2.pth"):
        (tmp_path / name).write_bytes(b"PK\3\4")
    model = f"model: {{arch: mini_gpt4, model_type: pretrain_vicuna, llama_model: {tmp_path}, "
    model += f"vit_ckpt: {tmp_path}/vit.pth, q_former_model: {tmp_path}/blip2.pth}}\n"

    def read(text, *options, for_training=False):
        path = tmp_path / "c.yaml"
        path.write_text(model + text)
        return Config(Namespace(cfg_path=path, options=list(options)), for_training)

    return read


def problems_of(read, *arguments, **settings):
    with pytest.raises(ConfigError) as caught:
        read(*arguments, **settings)
    return [str(problem) for problem in caught.value.problems]


def test_every_section_of_a_benchmark_may_refer_to_others(read):
    """The first one, too, for which the section `evaluation_datasets` has to be made."""
    sections = "".join(
        f"  {name}: {{eval_file_path: '${{env.cache_root}}/{name}', img_path: a}}\n"
        for name in ("gqa", "pope")
    )
    cfg = read(f"evaluation_datasets:\n{sections}", "env.cache_root=/cache")
    assert [cfg.benchmark_cfg(name).eval_file_path for name in ("gqa", "pope")] == [
        "/cache/gqa",
        "/cache/pope",
    ]
    assert set(cfg.to_dict()["evaluation_datasets"]) == {"gqa", "pope"} and not cfg.report.problems


# problems


def test_a_typo_in_one_section_hides_nothing_of_another(read):
    sections = f"  laion: {{build_info: {{storage: /none/0.tar}}, {TRAIN}}}\n"
    sections += f"  laion_extra: {{builder: laion, build_info: {{storag: /x, storage: /none/1.tar}}, {TRAIN}}}\n"
    assert problems_of(read, f"{RUN}datasets:\n{sections}", for_training=True) == [
        "datasets.laion_extra.build_info.storag: unknown key. Did you mean 'storage'? (c.yaml line 5)",
        "datasets.laion.build_info.storage: no file matches '/none/0.tar' (first missing: /none/0.tar) (c.yaml line 4)",
    ]


def test_problems_are_objects_with_key_message_and_place(read):
    with pytest.raises(ConfigError) as caught:
        read("run:\n  sede: 3\n", "model.max_txt_len=x")
    assert caught.value.problems == [
        Problem("model.max_txt_len", "'x' (str) is not an integer", "--options"),
        Problem("run.sede", "unknown key. Did you mean 'seed'?", "c.yaml line 3"),
    ]
    assert str(caught.value).splitlines() == [
        "2 problems in the configuration:",
        "  model.max_txt_len: 'x' (str) is not an integer (--options)",
        "  run.sede: unknown key. Did you mean 'seed'? (c.yaml line 3)",
    ]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError([Problem("run.a", "bad"), Problem("run.b", "bad", "c.yaml line 1")]),
        DeviceError("run.device", "x"),
    ],
)
def test_errors_are_the_same_on_every_rank(error):
    """Rank 0 sends them to the others as pickles."""
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)


def test_keys_are_compared_part_by_part():
    assert (
        is_in("run", "run") and is_in("run.seed", "run") and is_in("datasets.a.type", "datasets.a")
    )
    assert (
        not is_in("running.seed", "run")
        and not is_in("datasets.ab", "datasets.a")
        and not is_in("run", "run.seed")
    )


class SaysItInWords(LaionBuilder):
    """A user's builder whose `preflight` returns texts instead of Problems; no shipped YAML has a section of its name."""

    @classmethod
    def preflight(cls, cfg, where):
        return [f"{where}.build_info.storage: too large: 3 TB", "the disk is full: wait"]


def test_what_a_class_of_the_users_own_says_in_strings_is_filed_by_key(read, monkeypatch):
    monkeypatch.setitem(registry._classes["builder"], "says_it_in_words", SaysItInWords)
    section = f"datasets: {{says_it_in_words: {{build_info: {{storage: /x}}, {TRAIN}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        read(RUN + section, "datasets.says_it_in_words.build_info.storage=/y", for_training=True)
    assert caught.value.problems == [
        Problem("datasets.says_it_in_words.build_info.storage", "too large: 3 TB", "--options"),
        Problem("datasets.says_it_in_words", "the disk is full: wait", "c.yaml line 3"),
    ]


def test_a_path_into_the_folder_that_was_renamed_says_its_new_name():
    found = weights_problem("minigpt4/embedded/weights/eva_vit.safetensors", "model.vit_ckpt")
    assert found == Problem(
        "model.vit_ckpt",
        "no file at 'minigpt4/embedded/weights/eva_vit.safetensors' (found nothing); "
        "the folder minigpt4/embedded is now minigpt4/quickstart",
    )
    assert weights_problem("minigpt4/quickstart/weights/none", "x").message.endswith(
        "give the path of the file or its URL"
    )
    weights = Path(__file__).resolve().parents[2] / "minigpt4/quickstart/weights/blip2.safetensors"
    assert (
        weights_problem(weights, "x") is None
        and weights_problem("https://example.org/x.pth", "x") is None
    )


def test_no_shipped_file_names_the_old_folder():
    root = Path(__file__).resolve().parents[2]
    files = [*root.glob("minigpt4/configs/**/*.yaml"), *root.glob("*_configs/*.yaml")]
    assert len(files) > 10
    assert not [file for file in files if "minigpt4/embedded" in file.read_text()]


# image processors that follow the model

EXTRA = "  a: {builder: laion, vis_processor: {train: {name: blip2_image_train%s}, eval: {name: blip2_image_eval}}}\n"


def settings_of(cfg, name="a"):
    return {split: dict(cfg.datasets_cfg[name].vis_processor[split]) for split in ("train", "eval")}


@pytest.mark.parametrize(
    ("options", "size"),
    [([], 224), (["model.image_size=42"], 42), (["model.image_size=null"], 224)],
)
def test_image_processors_take_size_mean_and_std_from_the_model(read, options, size):
    cfg = read("datasets:\n" + EXTRA % "", *options)
    assert cfg.model_cfg.image_size == size
    assert cfg.image_settings == {
        "image_size": size,
        "mean": list(CLIP_MEAN),
        "std": list(CLIP_STD),
    }
    for settings in settings_of(cfg).values():
        assert {key: settings[key] for key in cfg.image_settings} == cfg.image_settings
        processor = registry.get_processor_class(settings["name"]).from_config(settings)
        assert (processor.image_size, processor.mean, processor.std) == (
            size,
            list(CLIP_MEAN),
            list(CLIP_STD),
        )


def test_what_a_section_says_itself_stays(read):
    cfg = read(
        "datasets:\n" + EXTRA % ", image_size: 42, mean: [0.5, 0.5, 0.5]", "model.image_size=42"
    )
    train = settings_of(cfg)["train"]
    assert (
        train["image_size"] == 42 and train["mean"] == [0.5] * 3 and train["std"] == list(CLIP_STD)
    )
    cfg = read("datasets:\n" + EXTRA % ", image_size: '${model.image_size}'", "model.image_size=42")
    assert settings_of(cfg)["train"]["image_size"] == 42


def test_a_size_that_is_not_the_models_is_a_problem(read):
    section = "datasets:\n" + EXTRA % ", image_size: 112"
    expected = (
        "datasets.a.vis_processor.train.image_size: 112, but the model takes images of 224 pixels; "
    )
    expected += "remove the line, or make it agree with model.image_size (c.yaml line 3)"
    assert problems_of(read, section) == [expected]
    assert problems_of(read, section.replace("112", "big")) == [
        "datasets.a.vis_processor.train.image_size: 'big' (str) is not an integer (c.yaml line 3)"
    ]
    # with a model section that cannot be read, the model's image size is unknown
    assert problems_of(read, section, "model.max_txt_len=x") == [
        "model.max_txt_len: 'x' (str) is not an integer (--options)"
    ]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_sizes_of_both_splits_and_through_interpolations_are_compared(read, split):
    processor = f"{{{split}: {{name: blip2_image_eval, image_size: '${{run.log_freq}}'}}}}"
    section = f"datasets: {{a: {{builder: laion, vis_processor: {processor}}}}}"
    assert problems_of(read, f"{section}\nrun: {{log_freq: 112}}\n") == [
        f"datasets.a.vis_processor.{split}.image_size: 112, but the model takes images of 224 pixels; "
        "remove the line, or make it agree with model.image_size (c.yaml line 2)"
    ]
    read(f"{section}\nrun: {{log_freq: 224}}\n")


def test_the_model_may_refer_to_sections_that_are_typed_after_it(read):
    options = ["model.image_size=${run.log_freq}", "run.log_freq=42"]
    assert read("datasets:\n" + EXTRA % "", *options).image_settings["image_size"] == 42
    wrong = "datasets:\n" + EXTRA % ", image_size: 112"
    (problem,) = problems_of(read, wrong, *options)
    assert "112, but the model takes images of 42 pixels" in problem


def test_what_the_model_cannot_resolve_is_a_line_of_the_report(read):
    """Also a default of `run`, which is not known yet."""
    for key in ("run.log_freq", "run.none"):
        assert problems_of(read, "", f"model.image_size=${{{key}}}") == [
            f"model.image_size: Interpolation key '{key}' not found (--options)"
        ]


@pytest.mark.parametrize("size", ["${run.batch_size_train}", "${run.none}", "many"])
def test_batch_sizes_of_datasets_may_refer_to_run(read, size):
    laion = (
        f"laion: {{batch_size: '{size}', build_info: {{storage: 'http://host/0.tar'}}, {TRAIN}}}"
    )
    sections = f"{RUN}datasets:\n  {laion}\n"
    if "train" in size:
        assert read(sections).datasets_cfg.laion.batch_size == 2
        return
    said = (
        "Interpolation key 'run.none' not found"
        if "$" in size
        else "'many' (str) is not an integer"
    )
    (problem,) = problems_of(read, sections, for_training=True)
    assert problem.startswith(f"datasets.laion.batch_size: {said}")


def test_a_batch_size_of_a_dataset_without_a_builder_hides_nothing(read):
    sections = "datasets: {none: {batch_size: many}, laion: {batch_size: 2}}\n"
    (problem,) = problems_of(read, sections)
    assert problem.startswith("datasets.none: unknown dataset builder 'none'")


def test_texts_have_no_image_size(read):
    cfg = read("datasets: {laion: {text_processor: {train: {name: blip_caption}}}}\n")
    assert dict(cfg.datasets_cfg.laion.text_processor.train) == {
        "name": "blip_caption",
        "prompt": "",
        "max_words": 50,
    }


# `~` and HOME


@pytest.fixture
def homeless(monkeypatch):
    """The environment of `docker run --user 12345`: no HOME, and a user without an entry."""
    for name in ("HOME", "USER", "LOGNAME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 12345)


NOWHERE = "'~' leads nowhere: HOME is not set, and user 12345 has no entry in /etc/passwd; set HOME, or give an absolute path"


def test_without_a_home_the_key_that_needs_one_is_named(read, homeless, monkeypatch, tmp_path):
    assert problems_of(read, "", "model.ckpt=~/a.pth") == [
        f"env.cache_root: '~/.cache/minigpt4': {NOWHERE}",
        f"model.ckpt: '~/a.pth': {NOWHERE} (--options)",
    ]
    read("", f"env.cache_root={tmp_path}")
    downloads = "model.vit_ckpt=https://example.org/vit.pth"
    (problem,) = problems_of(read, "", f"env.cache_root={tmp_path}", downloads)
    assert (
        problem
        == f"model: no folder for what is downloaded ('~/.cache/torch': {NOWHERE}); set TORCH_HOME (c.yaml line 1)"
    )
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    read("", f"env.cache_root={tmp_path}", downloads)
    monkeypatch.setenv("HOME", "")  # counts as unset
    assert problems_of(read, "")[0].startswith(
        "env.cache_root: '~/.cache/minigpt4': '~' leads nowhere"
    )


@pytest.mark.parametrize(
    "key", ["env.cache_root", "model.llama_model", "model.prompt_path", "run.output_dir"]
)
def test_a_user_or_variable_that_is_not_there_is_a_line_of_the_report(read, key):
    expected = f"{key}: '~no_user/7b': there is no user 'no_user'; a path below your own home folder begins with ~/"
    assert problems_of(read, "", f"{key}=~no_user/7b") == [f"{expected} (--options)"]
    expected = f"{key}: '$NO_SUCH/7b': the variable NO_SUCH is not set in the environment; set it, or write the path"
    assert problems_of(read, "", f"{key}=$NO_SUCH/7b") == [f"{expected} (--options)"]


@pytest.mark.parametrize("path", ["$NO_SUCH/x", "/data/$NO_SUCH/x"])
def test_a_variable_that_is_not_set_is_a_line_of_the_report(read, path):
    said = (
        f"'{path}': the variable NO_SUCH is not set in the environment; set it, or write the path"
    )
    for key in ("env.cache_root", "model.llama_model", "run.output_dir"):
        assert problems_of(read, "", f"{key}={path}") == [f"{key}: {said} (--options)"]


def test_texts_that_begin_like_a_home_are_texts(read):
    for text in ("~nobody/x", "$NO_SUCH"):
        assert read("", f"model.end_sym={text}").model_cfg.end_sym == text


def test_a_path_that_another_section_has_wrong_is_said_there(read):
    sections = f"{RUN}datasets:\n  laion: {{build_info: {{storage: '${{model.ckpt}}'}}, {TRAIN}}}\n"
    options = ("model.ckpt=~no_user/x", "run.output_dir=${model.ckpt}")
    (problem,) = problems_of(read, sections, *options, for_training=True)[:1]
    assert problem.startswith("model.ckpt: '~no_user/x': there is no user 'no_user'")


@pytest.mark.parametrize(
    "option, said",
    [
        ("run.output_dir=", "run.output_dir: missing; it has no default"),
        ("datasets.laion.build_info.storage=", "empty; give a path"),
        ("env.cache_root=", "empty; give a path"),
        ("model.llama_model=", "empty; give a path"),
        (
            "datasets.laion.text_processor.train.name=blip2_image_train",
            "'blip2_image_train' is a processor of images",
        ),
        (
            "datasets.laion.vis_processor.eval.name=blip_caption",
            "'blip_caption' is a processor of texts",
        ),
        (
            "datasets.laion.build_info.storage={a: b}",
            "{'a': 'b'} is no path of a shard; expected text",
        ),
        (
            r"datasets.laion.build_info.storage=C:\data\0.tar",
            r"'C:\data\0.tar' is an absolute path of Windows",
        ),
        (r"datasets.laion.build_info.storage=data\0.tar", r"(first missing: data\0.tar)"),
        (
            "datasets.laion.build_info.storage=https:/host/0.tar",
            "'https:/host/0.tar' names no host",
        ),
    ],
)
def test_what_training_would_refuse_is_refused_before_it(read, option, said, tmp_path):
    sections = (
        f"{RUN}datasets:\n  laion: {{build_info: {{storage: 'http://host/0.tar'}}, {TRAIN}}}\n"
    )
    options = (f"model.ckpt={tmp_path}/vit.pth", option)
    (problem,) = problems_of(read, sections, *options, for_training=True)
    assert problem.startswith(option.split("=")[0]) and said in problem
