"""Paths and files that a configuration names."""

import hashlib
import os
from pathlib import Path
from urllib.parse import urldefrag, urlparse

from minigpt4.common.config_report import Problem


def expand_path(path: str | Path) -> Path:
    """Return `path` with `~` and `$VARIABLES` filled in; a relative one stays relative to the CWD."""
    return Path(os.path.expandvars(str(path))).expanduser()


def is_url(path: str | Path) -> bool:
    """Return whether `path` is an http(s) address."""
    return urlparse(str(path)).scheme in ("http", "https")


def without_secrets(path_or_url: str | Path) -> str:
    """Return a path, or an address without user, password and query, to be shown."""
    address = urlparse(str(path_or_url))
    if not is_url(path_or_url) or not (address.query or "@" in address.netloc):
        return str(path_or_url)
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def cached_path(path_or_url: str | Path) -> Path:
    """Return where a file is, or would be once downloaded, without touching the network."""
    if not is_url(path_or_url):
        return expand_path(path_or_url)
    # where torch.hub, and so the 2023 release, keeps what it downloads
    cache = os.environ.get("TORCH_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/torch")
    return expand_path(cache) / "hub/checkpoints" / Path(urlparse(path_or_url).path).name


def missing_file(path_or_url: str | Path, where: str) -> Problem | None:
    """Return the Problem of key `where` if a local path is no file, else None; URLs are not tried."""
    path = cached_path(path_or_url)
    if is_url(path_or_url) or path.is_file():
        return None
    found = "a folder" if path.is_dir() else "nothing"
    hint = "give the path of the file or its URL"
    if "minigpt4/embedded/" in path.as_posix():
        hint = "the folder minigpt4/embedded is now minigpt4/quickstart"
    return Problem(where, f"no file at '{path}' (found {found}); {hint}")


def resolve_file(path_or_url: str | Path, where: str) -> Path:
    """Return the local path of a file named by path or URL, downloaded once per machine.

    A URL may end in `#sha256=<hex>`: the download is then kept only if it has that hash. `where` is
    the configuration key that messages name. Raises FileNotFoundError if a path leads nowhere,
    ValueError if a download is a web page or has another hash, OSError if the download failed.
    """
    if problem := missing_file(path_or_url, where):
        raise FileNotFoundError(str(problem))
    path = cached_path(path_or_url)
    if not path.is_file():
        _download(path_or_url, path, where)
    return path


def check_not_html(path: str | Path, where: str) -> None:
    """Raise ValueError if the file at `path` is a web page, as a dead link leaves behind."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise ValueError(
            f"{where}: '{path}' is an HTML page, not weights: the download went wrong. Delete it and download it again"
        )


def _download(url: str, path: Path, where: str) -> None:
    from iopath.common.download import download
    from iopath.common.file_io import file_lock

    address, fragment = urldefrag(url)
    with file_lock(str(path)):  # of all ranks of a machine one downloads
        if path.is_file():
            return
        fresh = Path(f"{path}.partial")
        try:
            download(address, str(path.parent), filename=fresh.name)
            check_not_html(fresh, where)
            expected = fragment.removeprefix("sha256=")
            if expected != fragment and (found := file_sha256(fresh)) != expected.lower():
                raise ValueError(
                    f"{where}: the downloaded file has sha256 {found}, expected {expected}; it was not kept"
                )
            os.replace(fresh, path)
        except OSError as error:
            raise OSError(
                f"{where}: could not download {without_secrets(address)} ({error}). Download it by hand to '{path}', "
                f"or set {where} to the path of a copy"
            ) from error
        finally:
            fresh.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Return a hash of a file of weights, or of those in a folder: of their sizes and a sample of their bytes.

    Equal weights that were saved in another way have another one.
    """
    digest, path = hashlib.sha256(), expand_path(path)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in [file for file in files if file == path or file.suffix in (".safetensors", ".bin")]:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as opened:
            for block in range(64):
                opened.seek(block * size // 64)
                digest.update(opened.read(1 << 14))
    return digest.hexdigest()
