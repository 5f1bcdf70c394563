"""Fixtures that several test folders share."""

import gc
import logging
import os
import sys

# Before torch is imported, here and in the programs that tests start: the models are tiny, and on a busy machine
# threads that spin while they wait make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# each program that compiles would start processes for it, and a test run has its own workers already
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# before the imports too: the programs set it for the same reason
gc.set_threshold(20_000, 20, 20)

import pytest

from minigpt4.common.registry import registry
from tests.small_release import write_small_release

SLOW = ("slow", "registry", "browser")


def pytest_collection_modifyitems(items):
    """Begin with the files that hold slow tests: a worker takes whole files, and none should end with a long one."""
    first = {item.path for item in items if any(item.get_closest_marker(name) for name in SLOW)}
    items.sort(key=lambda item: item.path not in first)  # the order is kept otherwise


@pytest.fixture(autouse=True)
def no_logger_left_behind():
    """Programs that run inside a test set up logging to its captured stream, which is closed after it."""
    yield
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler:
            logging.root.removeHandler(handler)
    for handler in logging.getLogger("transformers").handlers:  # of the test that imported it first
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.__stderr__  # setStream would flush one that is closed


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Small files of the released layout, written once; tests that damage a file do it in a copy."""
    return write_small_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def own_code(monkeypatch):
    """Take back what a test puts on sys.path, imports (my_.., own_..) and registers."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for kind in registry._classes:
        registry.names(kind)  # imports what is shipped, so that it stays registered
    monkeypatch.setattr(
        registry, "_classes", {kind: dict(known) for kind, known in registry._classes.items()}
    )
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("my_", "own_")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def chatml_tokenizer():
    """A byte-level BPE tokenizer with ChatML's special tokens, BOS <|im_start|>, as SmolLM2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        "user\n<Img></Img> Describe this image in detail.",
        "assistant\nThe image shows a red circle.",
    ] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>", "<|unk|>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
    )
