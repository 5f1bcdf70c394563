import dataclasses
import json
import shutil

import pytest

import minigpt4
from tests.serving.server import Server, Visitor, command


@pytest.fixture(scope="session")
def roomy(release, tmp_path_factory):
    """The small release with a context of 2,000 tokens: answers that take seconds can be stopped."""
    root = tmp_path_factory.mktemp("roomy")
    shutil.copytree(release.root, root, dirs_exist_ok=True)
    config = root / "vicuna" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2000})
    )
    return dataclasses.replace(release, root=root)


@pytest.fixture(scope="session")
def server(roomy, tmp_path_factory):
    """The demo as people start it, with a small model; its pool of threads has its full size."""
    server = Server(roomy, tmp_path_factory.mktemp("demo") / "log.txt")
    server.fill_pool()
    yield server
    server.close()
    assert list((roomy.root / "gradio").iterdir()) == []  # no upload is left


@pytest.fixture
def visitor(server):
    return Visitor(server)


@pytest.fixture(scope="session")
def loaded(roomy):
    """The same model in this process: (Chat, empty Conversation)."""
    line = command(roomy)
    options = line[line.index("--options") + 1 :]
    options += [f"model.vit_ckpt={roomy.hub}/eva_vit_g.pth", f"model.q_former_model={roomy.hub}"]
    options[-1] += "/blip2_pretrained_flant5xxl.pth"
    return minigpt4.load("eval_configs/minigpt4_eval.yaml", options)
