"""common/utils.py: weights named by a URL, variables in paths, what is safe and short enough to show."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minigpt4.common.config_values import hide_secrets
from minigpt4.common.utils import cached_path, expand_path, first_line, resolve_file


class Weights(BaseHTTPRequestHandler):
    """Answers each path with a file of its own, which may be weights by its first bytes."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content(self.path))

    def log_message(self, *args):
        pass


def content(path):
    return b"PK\3\4" + path.encode()


def digest(path):
    return hashlib.sha256(content(path)).hexdigest()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return the address of a server on this machine; what is downloaded goes to `tmp_path`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server = HTTPServer(("127.0.0.1", 0), Weights)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_file_of_the_same_name_from_elsewhere_is_not_taken_for_it(site):
    first = f"{site}/a/checkpoint_3.pth"
    path = resolve_file(first, "model.ckpt")
    assert path == resolve_file(first, "model.ckpt") and path.read_bytes() == content(
        "/a/checkpoint_3.pth"
    )
    with pytest.raises(ValueError) as caught:
        resolve_file(f"{site}/b/checkpoint_3.pth?token=x", "model.ckpt")
    assert str(caught.value) == (
        f"model.ckpt: '{path}' was downloaded from {first}, not from {site}/b/checkpoint_3.pth. Delete it and "
        f"'{path}.url' to download it again, or set model.ckpt to the path of a copy"
    )
    assert {file.name for file in path.parent.iterdir()} - {f"{path.name}.lock"} == {
        path.name,
        f"{path.name}.url",
    }


def test_the_hash_decides_about_a_file_that_is_there_already(site):
    path = resolve_file(f"{site}/a/x.pth", "model.ckpt")
    mirror = f"{site}/mirror/x.pth#sha256="
    assert resolve_file(mirror + digest("/a/x.pth").upper(), "model.ckpt") == path
    with pytest.raises(
        ValueError, match=f"'{path}' has sha256 {digest('/a/x.pth')}, expected 00. Delete it"
    ):
        resolve_file(f"{site}/a/x.pth#sha256=00", "model.ckpt")


def test_a_download_with_another_hash_is_not_kept(site):
    url = f"{site}/x.pth#sha256="
    with pytest.raises(ValueError, match="expected 00; it was not kept"):
        resolve_file(f"{url}00", "model.ckpt")
    assert not cached_path(url).exists()
    assert resolve_file(url + digest("/x.pth"), "model.ckpt").read_bytes() == content("/x.pth")


def test_a_copy_of_the_2023_release_is_found_under_its_name(site):
    path = cached_path(f"{site}/eva_vit_g.pth")
    path.parent.mkdir(parents=True)
    path.write_bytes(content("by hand"))
    assert resolve_file(f"{site}/eva_vit_g.pth", "model.vit_ckpt").read_bytes() == content(
        "by hand"
    )


def test_a_download_folder_that_cannot_be_made_is_named(site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"model.ckpt: could not download .* Download it by hand to"):
        resolve_file(f"{site}/x.pth", "model.ckpt")


def test_addresses_are_shown_without_secrets():
    shown = {
        "HTTPS://me:pw@host/a.tar?token=1": "HTTPS://host/a.tar",
        "https://me:pw@host/${env.x}/a.tar": "https://host/${env.x}/a.tar",
        "https://host/${env.x}/a.tar?token=1": "https://host/${env.x}/a.tar",
        "http://me:${oc.env:PW}@host/{0..9}.tar?key=1": "http://me:${oc.env:PW}@host/{0..9}.tar",
        "http://host/${a[0]}?key=${oc.env:KEY}": "http://host/${a[0]}?key=${oc.env:KEY}",
        "https://host/a.pth#sha256=00": "https://host/a.pth#sha256=00",
        "https://host/a.tar::https://me:pw@host/b.tar?key=1": "https://host/a.tar::https://host/b.tar",
        "a@b?c": "a@b?c",
    }
    assert hide_secrets(list(shown)) == list(shown.values())


@pytest.mark.parametrize("path", ["$NO_SUCH/x", "${NO_SUCH}/x", "/data/${NO_SUCH}"])
def test_a_variable_that_is_not_set_is_named_in_both_spellings(path):
    with pytest.raises(ValueError, match="the variable NO_SUCH is not set in the environment"):
        expand_path(path)


@pytest.mark.parametrize("message, line", [("a\nb", "a"), (" \n a\nb", "a"), ("", "OSError")])
def test_an_error_has_a_first_line(message, line):
    assert first_line(OSError(message)) == line
