"""Paths and files that a configuration names."""

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

_SHA256 = "sha256="


def expand_path(path):
    """Return `path` as a Path with `~` and `$VARIABLES` filled in; a relative one stays relative to the CWD."""
    return Path(os.path.expandvars(str(path))).expanduser()


def is_url(path):
    """Return whether `path` is an http(s) address."""
    return urlparse(str(path)).scheme in ("http", "https")


def without_secrets(path_or_url):
    """Return a path, or an address without what may be secret in it (user, password, query), to be shown."""
    address = urlparse(str(path_or_url))
    if not is_url(path_or_url) or not (address.query or "@" in address.netloc):
        return str(path_or_url)
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def torch_hub_checkpoints():
    """Return the folder in which torch.hub, and so the 2023 release, keeps downloaded checkpoints."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return expand_path(os.environ.get("TORCH_HOME", f"{cache}/torch")) / "hub" / "checkpoints"


def cached_path(path_or_url):
    """Return where a file is, or would be once downloaded, without touching the network."""
    if not is_url(path_or_url):
        return expand_path(path_or_url)
    return torch_hub_checkpoints() / Path(urlparse(path_or_url).path).name


def missing_file(path_or_url, where):
    """Return a problem line if `path_or_url` is a local path that is no file, else None (a URL may be downloaded)."""
    path = cached_path(path_or_url)
    if is_url(path_or_url) or path.is_file():
        return None
    found = "a folder" if path.is_dir() else "nothing"
    return f"{where}: no file at '{path}' (found {found}); give the path of the file or its URL"


def resolve_file(path_or_url, where):
    """Return the local path of a file named by path or URL, downloading it once per machine if need be.

    A URL may end in ``#sha256=<hex>``; the downloaded file is then kept only if it has that hash. `where` is the
    configuration key that messages name.

    Raises FileNotFoundError if a path leads nowhere, ValueError if a download is a web page or has another hash,
    OSError if the download failed.
    """
    problem = missing_file(path_or_url, where)
    if problem:
        raise FileNotFoundError(problem)
    path = cached_path(path_or_url)
    if not path.is_file():
        _download(path_or_url, path, where)
    return path


def check_not_html(path, where):
    """Raise ValueError if the file at `path` is a web page, as a failed download or a dead link leaves behind."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise ValueError(
            f"{where}: '{path}' is an HTML page, not weights: the download went wrong. Delete it and download it again"
        )


def _download(url, path, where):
    from iopath.common.download import download
    from iopath.common.file_io import file_lock

    address, _, fragment = url.partition("#")
    with file_lock(str(path)):  # the ranks of one machine share the file: one downloads, the others find it there
        if path.is_file():
            return
        fresh = Path(f"{path}.partial")
        try:
            download(address, str(path.parent), filename=fresh.name)
            check_not_html(fresh, where)
            if fragment.startswith(_SHA256):
                _check_sha256(fresh, fragment[len(_SHA256) :], where)
            os.replace(fresh, path)
        except OSError as error:
            raise OSError(
                f"{where}: could not download {without_secrets(address)} ({error}). Download it by hand to '{path}', "
                f"or set {where} to the path of a copy"
            ) from error
        finally:
            fresh.unlink(missing_ok=True)


def file_sha256(path):
    """Return the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(path, expected, where):
    found = file_sha256(path)
    if found != expected.lower():
        raise ValueError(f"{where}: the downloaded file has sha256 {found}, expected {expected}; it was not kept")
