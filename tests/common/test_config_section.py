"""from_config with the plain content of a YAML file, as in scripts of 2023: every absent key takes its default."""

import pytest
from omegaconf import OmegaConf

from minigpt4.common.config import ConfigError, as_section, load_environment
from minigpt4.common.registry import registry
from minigpt4.models.mini_gpt4_config import MiniGPT4Config
from tests.golden.model import golden_config


@pytest.mark.parametrize("form", [dict, OmegaConf.create])
def test_a_model_is_built_of_any_mapping(form, tmp_path):
    whole = golden_config(tmp_path)
    named = (
        "vit_ckpt",
        "q_former_model",
        "ckpt",
        "llama_model",
        "image_size",
        "num_query_token",
        "check_llm",
    )
    section = form(
        {key: whole[key] for key in named} | {"vit_precision": "fp32", "llm_precision": "fp32"}
    )
    model = registry.get_model_class("mini_gpt4").from_config(section, device="cpu")
    assert model.max_txt_len == 32 and model.end_sym == "\n"
    assert (
        model.identity()
        == registry.get_model_class("mini_gpt4").from_config(whole, device="cpu").identity()
    )


WRONG = {
    "a typo": (
        {"llama_model": "x", "end_symb": "#"},
        "model.end_symb: unknown key. Did you mean 'end_sym'?",
    ),
    "None": (None, "model.llama_model: missing; it has no default"),
    "a path": (
        "my.yaml",
        "model: str 'my.yaml'; expected a mapping, such as the section of a YAML file",
    ),
    "a list": ([1], "model: list [1]; expected a mapping, such as the section of a YAML file"),
    "a key that must be there": ({}, "model.llama_model: missing; it has no default"),
    "a word": (
        {"llama_model": "x", "max_txt_len": "long"},
        "model.max_txt_len: 'long' (str) is not an integer",
    ),
    "null": ({"llama_model": None}, "model.llama_model: null is not text"),
    "an interpolation": (
        {"llama_model": "${run.x}"},
        "model.llama_model: Interpolation key 'run.x' not found",
    ),
    "a placeholder": (
        {"llama_model": "/path/to/vicuna"},
        "model.llama_model: '/path/to/vicuna' is the placeholder of the shipped file; set it to your own path",
    ),
}


@pytest.mark.parametrize("section, message", WRONG.values(), ids=WRONG)
def test_a_mapping_that_is_no_section_is_refused_by_key(section, message):
    with pytest.raises(ConfigError) as caught:
        registry.get_model_class("mini_gpt4").from_config(section)
    assert list(map(str, caught.value.problems)) == [message]


def test_a_part_of_a_file_takes_what_the_rest_says():
    whole = OmegaConf.create({"root": "/llms", "model": {"llama_model": "${root}/vicuna"}})
    assert as_section(whole.model, MiniGPT4Config, "model").llama_model == "/llms/vicuna"


def test_the_shipped_environment_is_there(tmp_path, monkeypatch):
    """`${env.cache_root}` of shipped files resolves to the project's default."""
    monkeypatch.setenv("HOME", str(tmp_path))
    section = {
        "llama_model": "${env.cache_root}/llm",
        "vit_ckpt": "minigpt4/quickstart/weights/eva_vit.safetensors",
    }
    section["q_former_model"] = "minigpt4/quickstart/weights/blip2.safetensors"
    with pytest.raises(
        ValueError, match=rf"^model.llama_model: .*'{load_environment().cache_root}/llm'"
    ):
        registry.get_model_class("mini_gpt4").from_config(section | {"num_query_token": 16})


@pytest.mark.parametrize("form", [dict, OmegaConf.create])
def test_a_builder_is_made_of_any_mapping(form, release):
    section = {"build_info": {"storage": str(release.root / "cc_sbu_align")}}
    section["vis_processor"] = {"train": {"name": "blip2_image_train", "image_size": 8}}
    builder = registry.get_builder_class("cc_sbu_align")(form(section))
    (dataset,) = builder.build_datasets().values()
    assert len(dataset) == 6 and builder.config.sample_ratio is None
    with pytest.raises(ConfigError, match=r"datasets\.cc_sbu_align\.build_info\.storage: missing"):
        registry.get_builder_class("cc_sbu_align")(form({}))
