"""The benchmarks' 2023 baseline gives the numbers of the 2023 release (golden set c)."""

import numpy as np
import pytest
import torch

from benchmarks import baseline_2023
from tests.golden.model import FOLDER
from tests.golden.test_mini_gpt4 import LOSS_ATOL, WITH_LOSS, assert_close, model_of


@pytest.mark.parametrize("case", WITH_LOSS, ids=lambda case: case["case"])
def test_baseline_is_that_of_2023(case, tmp_path):
    model = model_of(case, tmp_path).train()
    expected = np.load(FOLDER / case["file"])
    loss = baseline_2023.loss(
        model, {"image": torch.from_numpy(expected["image"]), "text_input": case["text_input"]}
    )
    assert loss.item() == pytest.approx(case["loss"], rel=0, abs=LOSS_ATOL)
    loss.backward()
    assert_close(model.llama_proj.weight.grad, expected["grad_llama_proj_weight"], LOSS_ATOL)
    assert_close(model.llama_proj.bias.grad, expected["grad_llama_proj_bias"], LOSS_ATOL)
