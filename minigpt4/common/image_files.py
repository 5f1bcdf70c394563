"""Image files: listing those of a folder, and finding the file that a path in a data set means."""

import os
import re
import unicodedata
from pathlib import Path

# the first four are in the order in which cc_sbu_align looks for them
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # the beginning of an absolute path


def list_files(
    folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, follow_out: bool = False
) -> list[str]:
    """Return the sorted paths, relative to `folder`, of the files in and below it that end in `suffixes`.

    Hidden files and folders are skipped. So are links to folders within `folder`, whose content is listed anyway. Links
    out of it are refused, since whoever packed the folder could use them to read any text file as a caption; with
    `follow_out` they are followed, each folder once. Raises ValueError that names a link out, OSError that names a
    folder that cannot be read.
    """

    def relative(parent: str, name: str) -> str:
        return os.path.relpath(os.path.join(parent, name), folder)

    found, links_out = [], []
    visited = set()
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        # links may lead in circles: read each folder once
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # descend into real folders and, with `follow_out`, links out of `folder`
        files = [name for name in names if name.lower().endswith(suffixes) and name[0] != "."]
        below = [name for name in folders if name[0] != "."]
        links = [name for name in (*files, *below) if os.path.islink(os.path.join(parent, name))]
        out = [name for name in links if leads_out(folder, relative(parent, name))]
        folders[:] = [name for name in below if name not in links or (follow_out and name in out)]
        links_out += [relative(parent, name) for name in out]
        found += [relative(parent, name) for name in files]
    if links_out and not follow_out:
        first = min(links_out)
        raise ValueError(
            f"'{folder}': '{first}' is a link out of the folder, to '{os.path.realpath(os.path.join(folder, first))}' "
            f"({len(links_out)} such links); links out are not followed: give what it leads to by itself, or copy it here"
        )
    return sorted(found)


def _raise(error: OSError) -> None:
    raise OSError(f"the folder '{error.filename}' cannot be read ({error.strerror})") from error


def leads_out(folder: str | Path, path: str) -> bool:
    """Return whether a path relative to `folder`, with its links followed, is outside of `folder`."""
    target = Path(os.path.realpath(os.path.join(folder, path)))
    return not target.is_relative_to(os.path.realpath(folder))


def find_file(folder: str | Path, path: str) -> str | None:
    """Return the path, relative to `folder`, of the file that `path` means, None if there is none.

    It is the file of exactly that name, or else one whose name differs only in '/' for '\\', the Unicode form of its
    accents (macOS writes NFD, most others NFC), or the case of its suffix.
    """
    root, suffix = os.path.splitext(path.replace("\\", "/"))
    names = [path]
    for form in ("NFC", "NFD"):
        normalised = unicodedata.normalize(form, root)
        names += [normalised + ending for ending in (suffix, suffix.lower(), suffix.upper())]
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def same_file(path: str) -> str:
    """Return a key that is equal for all paths that `find_file` takes for the same file."""
    root, suffix = os.path.splitext(os.path.normpath(path.replace("\\", "/")))
    return unicodedata.normalize("NFC", root) + suffix.lower()
