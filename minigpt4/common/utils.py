"""Paths and files that a configuration names: expansion, downloads, checks by their first bytes, hashes."""

import hashlib
import json
import os
import re
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urlparse

from minigpt4.common.config_report import Problem


def expand_path(path: str | Path) -> Path:
    """Return `path` with `~` and `$VARIABLES` expanded; a relative path stays relative to the working directory.

    Raises ValueError if one cannot be expanded, so that no folder named `~` or `$VARIABLE` is ever made.
    """
    given = os.path.expandvars(str(path))
    if (unset := re.search(r"\$([A-Za-z_]\w*)|\$\{(\w+)\}", given)) and not os.path.exists(given):
        raise ValueError(
            f"'{path}': the variable {unset[1] or unset[2]} is not set in the environment; set it, or write the path"
        )
    expanded = os.path.expanduser(given)
    user = given.split("/")[0].removeprefix("~")
    is_unknown = expanded.startswith("~")
    if is_unknown and user:
        raise ValueError(
            f"'{path}': there is no user '{user}'; a path below your own home folder begins with ~/"
        )
    is_home_empty = given.startswith("~") and not user and not os.environ.get("HOME", "~")
    if is_unknown or is_home_empty:
        nowhere = f"'~' leads nowhere: HOME is not set, and user {os.getuid()} has no entry in /etc/passwd"
        raise ValueError(f"'{path}': {nowhere}; set HOME, or give an absolute path")
    return Path(expanded)


def first_line(error: object) -> str:
    """Return the first line of an error's message; the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_url(path: str | Path) -> bool:
    """Return whether `path` is an http(s) URL."""
    return urlparse(str(path)).scheme in ("http", "https")


def without_secrets(path_or_url: str | Path) -> str:
    """Return a path, or a URL without user, password and query, as text that is safe to show.

    Several URLs are separated by `::`. A user or query that is written with an interpolation `${..}` stays: what is
    secret should not be in it.
    """
    return "::".join(map(_without_secrets, re.split(r"::(?=(?i:https?)://)", str(path_or_url))))


def _without_secrets(text: str) -> str:
    parts = "(?P<scheme>https?://)(?P<user>[^/?#]*@)?(?P<place>[^?#]*)(?P<query>\\?[^#]*)?"
    url = re.match(parts, text, re.IGNORECASE)
    secrets = [key for key in ("user", "query") if url and url[key] and "${" not in url[key]]
    if not secrets:
        return text
    return "".join(part or "" for key, part in url.groupdict().items() if key not in secrets)


def printable(text: object, limit: int = 300) -> str:
    """Return a text from an untrusted source for one line of a log: at most `limit` characters, unprintable ones escaped."""
    text = str(text)
    text = text if len(text) <= limit else f"{text[:limit]}.."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def whole_text(text: str) -> str:
    """Return a text with each lone surrogate, on which tokenizers fail, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# files of a checkpoint folder, see common/checkpoint_folder.py
FOLDER_WEIGHTS, FOLDER_MANIFEST = "model.safetensors", "manifest.json"


def user_cache(name: str) -> Path:
    """Return the path of `name` in the user's cache folder. Raises ValueError if `~` cannot be expanded."""
    return expand_path(f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/{name}")


def cached_path(path_or_url: str | Path) -> Path:
    """Return the local path of a file, for a URL where its download is or would be, without using the network.

    For a checkpoint folder it is the path of its weights.
    """
    if not is_url(path_or_url):
        path = expand_path(path_or_url)
        return path / FOLDER_WEIGHTS if (path / FOLDER_MANIFEST).is_file() else path
    try:
        # the download folder of torch.hub, and so of the 2023 release
        home = os.environ.get("TORCH_HOME")
        cache = expand_path(home) if home else user_cache("torch")
        return cache / "hub/checkpoints" / Path(urlparse(path_or_url).path).name
    except ValueError as error:
        raise ValueError(f"no folder for what is downloaded ({error}); set TORCH_HOME") from error


def weights_problem(path_or_url: str | Path, where: str) -> Problem | None:
    """Return a Problem of the key `where` if a path is not a file of weights, by its first bytes, else None.

    For a URL, only a copy that was downloaded before is checked.
    """
    path = cached_path(path_or_url)
    if path.is_file():
        try:
            found = not_weights(path)
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        return Problem(where, f"'{path}' {found}") if found else None
    if is_url(path_or_url):
        return None
    found = "a folder" if path.is_dir() else "nothing"
    hint = "give the path of the file or its URL"
    if "minigpt4/embedded/" in path.as_posix():
        hint = "the folder minigpt4/embedded is now minigpt4/quickstart"
    return Problem(where, f"no file at '{path}' (found {found}); {hint}")


def resolve_file(path_or_url: str | Path, where: str) -> Path:
    """Return the local path of a file named by path or URL; a URL is downloaded once per machine.

    A URL may end in `#sha256=<hex>`, which the file must have. `where` is the configuration key that messages name.
    Raises FileNotFoundError if there is no file at a path, ValueError if what is downloaded, or was before, is another
    file, OSError if the download failed.
    """
    path = cached_path(path_or_url)
    if not path.is_file() and (problem := weights_problem(path_or_url, where)):
        raise FileNotFoundError(str(problem))
    if not path.is_file():
        _download(path_or_url, path, where)
    elif is_url(path_or_url):
        _check_copy(path_or_url, path, where)
    return path


_AGAIN = "the download went wrong. Delete it and download it again"


LFS_POINTER = "version https://git-lfs"  # begins what git without git-lfs leaves of a large file


def placeholder(path: str | Path, meant: str = "weights") -> str | None:
    """Return a message if a file is only a placeholder of what was `meant` to be there, else None.

    Placeholders are a Git LFS pointer, a web page, and an empty file.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(LFS_POINTER.encode()):
        advice = "install git-lfs and run `git lfs pull` in its clone, or download it by hand"
        return f"is a Git LFS pointer, not the file itself: {advice}"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return f"is an HTML page, not {meant}: {_AGAIN}"
    return None if head else f"is empty: {_AGAIN}"


def not_weights(path: str | Path) -> str | None:
    """Return what a file is instead of weights, and what to do; None if it may be weights by its first bytes."""
    if found := placeholder(path):
        return found
    with open(path, "rb") as file:
        head = file.read(512)
    # weights are binary; text, such as an error page in XML or JSON, has no control characters
    if all(byte >= 32 or byte in b"\t\n\r" for byte in head):
        return f"is text, not weights (it begins with {head[:40].decode(errors='replace')!r}): {_AGAIN}"
    # torch writes a zip archive or a pickle; safetensors begins with the length (8 bytes) of a JSON text
    if not head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
        return f"is no file of torch or safetensors (it begins with {head[:8]!r}): {_AGAIN}"
    return None


def _download(url: str, path: Path, where: str) -> None:
    """Download weights to `path`, checked by first bytes and hash, unless another process has done so.

    `<path>.url` keeps the address: the name alone may be that of another file.
    """
    from iopath.common.download import download
    from iopath.common.file_io import file_lock

    address, partial = urldefrag(url).url, Path(f"{path}.partial")
    shown = without_secrets(address)
    try:
        # one of the ranks of a machine downloads, the others wait
        with file_lock(str(path)), ExitStack() as at_end:
            at_end.callback(partial.unlink, missing_ok=True)
            if path.is_file():
                return _check_copy(url, path, where)
            _source(path).unlink(missing_ok=True)  # a copy made by hand has no known address
            download(address, str(path.parent), filename=partial.name)
            if found := not_weights(partial):
                raise ValueError(f"{where}: what lies at {shown} {found}")
            if found := _other_hash(url, partial):
                raise ValueError(f"{where}: the downloaded file {found}; it was not kept")
            _source(path).write_text(shown, encoding="utf-8")
            os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"{where}: could not download {shown} ({error}). Download it by hand to '{path}', "
            f"or set {where} to the path of a copy"
        ) from error


def _source(path: Path) -> Path:
    """Return the file that holds the address from which `path` was downloaded."""
    return Path(f"{path}.url")


def _check_copy(url: str, path: Path, where: str) -> None:
    """Raise ValueError if a file that was there before the download of `url` is another one.

    Without a hash it is known by its address; a copy of unknown origin, as of the 2023 release, is accepted.
    """
    shown, source = without_secrets(urldefrag(url).url), _source(path)
    found = _other_hash(url, path)
    if "#sha256=" not in url and source.is_file():
        known = source.read_text(encoding="utf-8")
        found = f"was downloaded from {known}, not from {shown}" if known != shown else None
    if found:
        raise ValueError(
            f"{where}: '{path}' {found}. Delete it and '{source}' to download it again, or set {where} to the path of a copy"
        )


def _other_hash(url: str, path: Path) -> str | None:
    """Return how the hash of a file differs from the `#sha256=<hex>` of a URL; None if it does not."""
    expected = url.partition("#sha256=")[2]
    if not expected:
        return None
    state = path.stat()
    found = _sha256_once(path, state.st_size, state.st_mtime_ns)
    if found == expected.lower():
        return None
    return f"has sha256 {found}, expected {expected}"


@lru_cache
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    """Return the sha256 of a file; it is read once for its size and time of change."""
    return file_sha256(path)


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file in UTF-8. Raises OSError, or ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8 ({error})") from error


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Return a hash of a weight file, or of those in a folder: of their sizes and a sample of their bytes.

    The same weights in another file format have another hash.
    """
    digest, path = hashlib.sha256(), expand_path(path)
    files = [path]
    if not path.is_file():
        files = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".bin")]
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with open(file, "rb") as opened:
            for block in range(64):
                opened.seek(block * size // 64)
                digest.update(opened.read(1 << 14))
    return digest.hexdigest()
