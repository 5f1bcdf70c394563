"""Files of a folder: which there are, and which one a written path means."""

import os
import re
import unicodedata
from pathlib import Path

# the first four in the order in which cc_sbu_align looks for them
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # begins an absolute one


def list_files(
    folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, follow_out: bool = False
) -> list[str]:
    """Return the paths, from `folder`, of the files in it and below that end in `suffixes` and are not hidden, sorted.

    A link to a folder within `folder` is passed by: what it leads to is listed under its own name. Links out of it are
    refused, for whoever packed the folder could make any text a caption; with `follow_out` they are followed, each
    folder once. Raises ValueError that names a link out, OSError that names a folder below that cannot be read.
    """
    found, links = [], []
    seen = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        # Links may lead in circles: each folder is read once.
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Links within the folder lead to what is listed anyway; links out of it are kept apart.
        files = [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
        below = [name for name in folders if name[0] != "."]
        linked = [name for name in (*files, *below) if os.path.islink(os.path.join(place, name))]
        out = [
            name
            for name in linked
            if leads_out(folder, os.path.relpath(os.path.join(place, name), folder))
        ]
        folders[:] = [name for name in below if name not in linked or (follow_out and name in out)]
        links += [os.path.relpath(os.path.join(place, name), folder) for name in out]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in files]
    if links and not follow_out:
        first = min(links)
        raise ValueError(
            f"'{folder}': '{first}' is a link out of the folder, to '{os.path.realpath(os.path.join(folder, first))}' "
            f"({len(links)} such links); links out are not followed: give what it leads to by itself, or copy it here"
        )
    return sorted(found)


def _raise(error: OSError) -> None:
    raise OSError(f"the folder '{error.filename}' cannot be read ({error.strerror})") from error


def leads_out(folder: str | Path, path: str) -> bool:
    """Return whether a path from `folder`, its links followed, lies outside of it."""
    return not Path(os.path.realpath(os.path.join(folder, path))).is_relative_to(
        os.path.realpath(folder)
    )


def find_file(folder: str | Path, path: str) -> str | None:
    """Return the path, from `folder`, of the file that `path` means, or None.

    It is the file of that very name, or else one whose name differs only in '/' for '\\', the form of its accents
    (macOS writes NFD, most others NFC), or capitals in the suffix.
    """
    root, suffix = os.path.splitext(path.replace("\\", "/"))
    names = [path]
    for form in ("NFC", "NFD"):
        plain = unicodedata.normalize(form, root)
        names += [plain + ending for ending in (suffix, suffix.lower(), suffix.upper())]
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def same_file(path: str) -> str:
    """Return a text that is equal for all paths that `find_file` takes for the same."""
    root, suffix = os.path.splitext(path.replace("\\", "/"))
    return unicodedata.normalize("NFC", root) + suffix.lower()
