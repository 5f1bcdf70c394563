"""A checkpoint of the small release as a folder, exported, and imported again."""

from types import SimpleNamespace

import pytest

from minigpt4.export import main

CFG_PATH = "eval_configs/minigpt4_eval.yaml"


@pytest.fixture(scope="session")
def hub(release):
    """Return the small release; its hub files are found during the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(release.root / "torch"))
        yield release


@pytest.fixture(scope="session")
def options(hub):
    """Return the --options with which the small release is opened on a CPU."""
    model = {"llama_model": hub.llama, "low_resource": False, "llm_precision": "fp32"}
    return [f"model.{key}={value}" for key, value in model.items()] + ["run.device=cpu"]


@pytest.fixture(scope="session")
def folders(hub, options, tmp_path_factory):
    """Return the folders `checkpoint`, `hf` (exported from it) and `again` (imported from `hf`)."""
    root = tmp_path_factory.mktemp("exports")
    made = SimpleNamespace(checkpoint=root / "checkpoint", hf=root / "hf", again=root / "again")
    command = [
        str(hub.checkpoint),
        "--cfg-path",
        CFG_PATH,
        "--options",
        *options,
        "--license",
        "CC-BY-4.0",
    ]
    assert main([*command, "--to", "checkpoint", str(made.checkpoint)]) == 0
    assert main([str(made.checkpoint), "--to", "hf", str(made.hf)]) == 0
    assert main([str(made.hf), "--to", "checkpoint", str(made.again)]) == 0
    return made
