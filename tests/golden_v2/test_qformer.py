"""With a Q-Former the newest release gives the losses of 2023, but that it learns the end token."""

import numpy as np
import pytest
import torch

from tests.golden.model import FOLDER
from tests.golden.test_mini_gpt4 import CASES, model_of
from tests.golden_v2 import needs, read

pytestmark = needs("a_minigpt4_noqf/with_qformer_vs_2023.json")
LOSS = 2e-5  # the fixtures' README
ROWS = read("a_minigpt4_noqf/with_qformer_vs_2023.json", {"cases": []})["cases"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_losses(row, tmp_path):
    case = next((case for case in CASES if case["case"] == row["case"]), None)
    if case is None:
        pytest.skip(f"the 2023 set of fixtures has no case {row['case']}")
    model = model_of(case, tmp_path, mask_eos_labels=False).train()
    golden = np.load(FOLDER / case["file"])
    samples = {"image": torch.from_numpy(golden["image"]), "text_input": case["text_input"]}
    assert model(samples)["loss"].item() == pytest.approx(row["loss_head"], rel=0, abs=LOSS)
    labels = model.build_inputs(samples)[0]["labels"].tolist()
    assert (labels == golden["targets"].tolist()) == row["targets_equal"]
