"""Arbitrary content as a configuration: it is read, or quickly refused by a ConfigError that names a key; no other error."""

from argparse import Namespace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from minigpt4.common.config import Config, ConfigError

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
KEYS = [
    f"model{key}"
    for key in (
        "",
        ".arch",
        ".model_type",
        ".ckpt",
        ".image_size",
        ".llama_model",
        ".end_sym",
        ".x",
    )
]
KEYS += [
    f"datasets{key}"
    for key in ("", ".a", ".a.builder", ".a.type", ".a.build_info.storage", ".a.val", ".b")
]
KEYS += [
    f"datasets.a.vis_processor{key}"
    for key in ("", ".train", ".train.name", ".train.image_size", ".train.mean")
]
KEYS += [
    f"run{key}"
    for key in ("", ".task", ".runner", ".lr_sched", ".init_lr", ".seed", ".batch_size_train", ".x")
]
KEYS += [
    "run.train_splits",
    "run.train_splits.0",
    "run.output_dir",
    "run.device",
    "run.resume_ckpt_path",
]
KEYS += ["run.world_size", "env", "env.cache_root", "imports", "extra", "datasets.a.build_info"]
TEXTS = [
    "",
    "???",
    "${",
    "${run.seed}",
    "${model.ckpt}",
    "${nowhere}",
    "${oc.env:NOWHERE}",
    "${oc.decode:'['}",
    "~",
    "~no/x",
]
TEXTS += [
    "a: b",
    "[",
    "{}",
    "[]",
    "null",
    "1e999",
    ".nan",
    "0x" + "f" * 99,
    "9" * 99,
    "\0",
    "\t",
    "%",
    "&a [*a]",
    "!!set {a}",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(TEXTS),
    st.sampled_from(KEYS),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["arch", "name", "train", "storage", "a", "", "a.b"]) | st.integers(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
BASE = {
    "model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna", "llama_model": "/nowhere"},
    "datasets": {
        "a": {
            "builder": "image_text_jsonl",
            "build_info": {"storage": "/nowhere.jsonl"},
            "vis_processor": {"train": {"name": "blip2_image_train"}},
        }
    },
    "run": {"task": "image_text_pretrain", "device": "cpu", "init_lr": 1e-3},
}


def read(path, options=()):
    """Return the problems of a configuration for training, each of which must have a key."""
    try:
        Config(Namespace(cfg_path=path, options=list(options)), for_training=True)
    except ConfigError as error:
        assert all(problem.key and problem.message for problem in error.problems)
        return [str(problem) for problem in error.problems]
    return []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "c.yaml"
    OmegaConf.save(OmegaConf.create(BASE), path)
    return path


@BOUNDED
@given(
    st.dictionaries(
        st.sampled_from(KEYS) | st.text(max_size=6), TREES | SCALARS, min_size=1, max_size=3
    )
)
@example({"run": 3, "model": [1], "datasets": "text"})
@example({"run.seed": "x", "run": "null", "datasets.a": "7"})
def test_options_of_anything(base, changes):
    options = [f"{key}={value}" for key, value in changes.items()]
    assert read(base, options)  # at least that the LLM's folder does not exist
    assert read(base, [text for pair in changes.items() for text in map(str, pair)])


@BOUNDED
@given(st.dictionaries(st.sampled_from(KEYS), TREES, min_size=1, max_size=4))
def test_yaml_of_anything(tmp_path_factory, changes):
    import yaml

    plain = OmegaConf.to_container(OmegaConf.create(BASE))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = plain
        for name in parents:
            node = node.setdefault(name, {}) if isinstance(node, dict) else {}
            node = node if isinstance(node, dict) else {}
        node[last] = value
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(
        yaml.safe_dump(plain, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
    )
    assert read(path)


@BOUNDED
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)
@example("model: {arch: mini_gpt4}\n".encode("utf-16"))
def test_files_of_anything(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    assert read(path)
