import pytest

from minigpt4.conversation.conversation import Chat
from minigpt4.processors import Blip2ImageEvalProcessor
from tests.golden import model as golden
from tests.small_release import picture


@pytest.fixture(scope="session")
def golden_model(tmp_path_factory):
    return golden.golden_model(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session")
def vis_processor():
    return Blip2ImageEvalProcessor(golden.CONFIG["image_size"])


@pytest.fixture(scope="session")
def chat(golden_model, vis_processor):
    return Chat(golden_model, vis_processor)


@pytest.fixture(scope="session")
def embeddings(chat):
    return chat.encode_images([picture(seed) for seed in range(4)])
