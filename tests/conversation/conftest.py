import json

import pytest

from minigpt4.conversation.conversation import Chat
from minigpt4.processors import Blip2ImageEvalProcessor
from tests.golden import GOLDEN
from tests.small_release import picture


@pytest.fixture(scope="session")
def chat(golden_model):
    size = json.loads((GOLDEN / "c_minigpt4/config.json").read_text())["image_size"]
    return Chat(golden_model, Blip2ImageEvalProcessor(size))


@pytest.fixture(scope="session")
def embeddings(chat):
    return chat.encode_images([picture(seed) for seed in range(4)])
