"""Fixtures that several test folders share."""

import pytest

from tests.small_release import write_small_release


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Small files of the released layout, written once; tests that damage a file do it in a copy."""
    return write_small_release(tmp_path_factory.mktemp("release"))
