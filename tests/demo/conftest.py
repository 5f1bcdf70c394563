import pytest

from tests.demo.server import Server, Visitor


@pytest.fixture(scope="session")
def server(release, tmp_path_factory):
    """The demo as people start it, with a small model."""
    server = Server(release, tmp_path_factory.mktemp("demo") / "log.txt")
    yield server
    server.close()


@pytest.fixture
def visitor(server):
    return Visitor(server)
