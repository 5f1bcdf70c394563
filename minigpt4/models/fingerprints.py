"""What tells weights from others, without reading all of them: of a file as it is, or of the tensors in it."""

import hashlib
import json
from pathlib import Path

from minigpt4.common.utils import expand_path, fingerprint

_BLOCKS, _BLOCK = 4, 1 << 12  # of each tensor so many samples of so many bytes


def content_fingerprint(path: str | Path) -> str | None:
    """Return a hash of the tensors of a .safetensors file, or of all those in a folder; None without such files.

    Of their names, types, shapes and a sample of their bytes: the same for equal weights in another order, in other
    shards or with other metadata, as another version of a library saves them.
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
        size = int.from_bytes(file.read(8), "little")  # of the header, behind which the tensors lie
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            digest = hashlib.sha256()
            for block in range(_BLOCKS):
                place = start + block * (end - start) // _BLOCKS
                file.seek(8 + size + place)
                digest.update(file.read(min(_BLOCK, end - place)))
            samples[name] = f"{tensor['dtype']} {tensor['shape']} {digest.hexdigest()}"
    return samples


def is_same(saved: dict[str, str], own: dict[str, str], path: str | Path) -> bool:
    """Whether weights at `path`, of the identity `own`, are those of the identity `saved`.

    Their files are the same, or else their tensors.
    """
    if saved.get("fingerprint") == own["fingerprint"]:
        return True
    return saved.get("content") is not None and saved["content"] == content_fingerprint(path)


def with_content(identity: dict[str, str], path: str | Path) -> dict[str, str | None]:
    """Return an identity with the fingerprint of the tensors too, if `path` still has the file that it is of."""
    there = expand_path(path).exists() and fingerprint(path) == identity["fingerprint"]
    return {**identity, "content": content_fingerprint(path) if there else None}
