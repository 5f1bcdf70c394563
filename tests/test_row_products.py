"""The candidate kernels of `benchmarks gpu --part products` compute the product: in Triton's interpreter, without a GPU."""

import json
import os
import subprocess
import sys

import pytest

# Triton decides at import whether it interprets. In float16 the result is rounded least; of bfloat16 the interpreter
# cuts off what a GPU rounds.
PROBE = """
import json, torch
from benchmarks import products_on_gpu as products
torch.manual_seed(0)
products.DTYPES["int4"] = torch.float16
# outputs and columns that no block divides; the layer of int4 needs multiples of 16 and 32
found = [products.errors(kind, rows, 4128, torch.device("cpu")) for kind, rows in zip(products.KINDS, (11, 11, 16))]
print(json.dumps(found))
"""


def test_every_candidate_is_right():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROBE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [len(errors) for errors in found] == [3, 3, 3]
    for errors in found:
        # rounding to float16, and nothing more; measured: 1.7e-4 to 2.3e-4
        assert all(5e-5 < error < 3e-4 for error in errors.values()), errors
