"""Fingerprints that identify weight files without reading all of them, by the file or by the tensors in it."""

import hashlib
import json
from pathlib import Path

from minigpt4.common.utils import expand_path, fingerprint

_BLOCKS, _BLOCK = 4, 1 << 12  # samples per tensor, and their bytes


def content_fingerprint(path: str | Path) -> str | None:
    """Return a hash of the tensors in a .safetensors file, or in all of a folder; None without such files.

    It covers their names, types, shapes and a sample of their bytes. So it is the same for equal weights in another
    order, in other shards or with other metadata, as another version of a library may save them.
    """
    path = expand_path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    samples = {}
    for file in files:
        samples |= _samples(file)
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(f"{name} {samples[name]}\n".encode())
    return digest.hexdigest()


def _samples(path: Path) -> dict[str, str]:
    """Return {name: type, shape and hash of a sample of bytes} of a safetensors file's tensors."""
    samples = {}
    with open(path, "rb") as file:
        # the format: the header's size in 8 bytes, the header, then the tensors, whose offsets count from there
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            digest = hashlib.sha256()
            for block in range(_BLOCKS):
                offset = start + block * (end - start) // _BLOCKS
                file.seek(8 + header_size + offset)
                digest.update(file.read(min(_BLOCK, end - offset)))
            samples[name] = f"{tensor['dtype']} {tensor['shape']} {digest.hexdigest()}"
    return samples


def is_same(saved: dict[str, str], own: dict[str, str], path: str | Path) -> bool:
    """Whether the weights at `path`, with the identity `own`, are those of the identity `saved`.

    They are if the files are the same, or else the tensors in them.
    """
    if saved.get("fingerprint") == own["fingerprint"]:
        return True
    return saved.get("content") is not None and saved["content"] == content_fingerprint(path)


def with_content(identity: dict[str, str], path: str | Path) -> dict[str, str | None]:
    """Return an identity plus "content", the fingerprint of the tensors; None if `path` no longer has these weights."""
    is_there = expand_path(path).exists() and fingerprint(path) == identity["fingerprint"]
    return {**identity, "content": content_fingerprint(path) if is_there else None}
