"""Fixtures that several test folders share."""

import os

# Before torch is imported, here and in the programs that tests start: the models are tiny, and on a busy machine
# threads that spin while they wait make them many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.small_release import write_small_release


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Small files of the released layout, written once; tests that damage a file do it in a copy."""
    return write_small_release(tmp_path_factory.mktemp("release"))
