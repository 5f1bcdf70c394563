"""The quickstart's data and language model at toy size."""

import pytest

from minigpt4.quickstart import prepare


@pytest.fixture(scope="session")
def cache(release, tmp_path_factory):
    """A cache root with a few drawn images and the toy LLM."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_SIZE", 4)
        patch.setattr(prepare, "NUM_SAMPLES", {"laion": 32, "cc_sbu": 32, "cc_sbu_align": 6})
        (root / "embedded").mkdir()
        (root / "embedded/llm").symlink_to(release.llama)
        prepare.prepare(root)
    return root
