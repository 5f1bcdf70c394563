"""The counting GPU, built once for this torch; a test is skipped, with the reason, where that cannot be done."""

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def on_counting_gpu(tmp_path_factory):
    """Return a function that runs `python -m words..` there and gives the object that it prints as its last line."""
    folder = tmp_path_factory.mktemp("counting_gpu")
    build(folder)
    driver, runtime = folder / "libcuda.so.1", folder / "libfakecudart.so"
    environment = os.environ | {
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(driver.parent),
        "PYTHONPATH": f"{HERE / 'site'}:{ROOT}",
        "FAKE_GIB": "78",
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(*words, timeout=600, gpus=1):
        command = [sys.executable, "-m", *map(str, words)]
        env = environment | {"FAKE_GPUS": str(gpus)}
        result = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def build(folder):
    """Compile the two libraries into `folder`."""
    missing = [name for name in ("nvidia", "triton") if importlib.util.find_spec(name) is None]
    if torch.version.cuda is None or missing or not shutil.which("gcc"):
        pytest.skip(
            "the counting GPU needs gcc and the CUDA build of torch, with its nvidia packages and triton"
        )
    roots = importlib.util.find_spec("nvidia").submodule_search_locations
    headers = [
        path for root in roots for path in glob.glob(f"{root}/**/cublasLt.h", recursive=True)
    ]
    if not headers:
        pytest.skip(
            "the counting GPU needs the headers of cuBLAS, which torch's nvidia packages bring"
        )
    triton = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/include"
    # a header of C++ that those packages lack, and C does not need
    (folder / "include/nv").mkdir(parents=True)
    (folder / "include/nv/target").touch()
    # triton's may be of an older CUDA than torch's: they fill up what those lack
    paths = (f"-I{Path(headers[0]).parent}", "-idirafter", triton, "-idirafter", folder / "include")
    common = ["gcc", "-O2", "-fPIC", "-shared", "-w", *paths]
    libraries = {"libfakecudart.so": ("fakecudart.c", "stubs.c"), "libcuda.so.1": ("fakecuda.c",)}
    for name, sources in libraries.items():
        command = [
            *common,
            "-o",
            folder / name,
            *(HERE / source for source in sources),
            "-ldl",
            "-lpthread",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"the counting GPU does not compile here: {result.stderr[:300]}")
