"""With a Q-Former the newest release gives the losses of 2023, but that it learns the end token."""

import numpy as np
import pytest
import torch

from minigpt4.text.rows import IGNORED
from tests.golden.model import FOLDER
from tests.golden.test_mini_gpt4 import CASES, model_of
from tests.golden_v2 import GOLDEN, read

LOSS = 2e-5  # the fixtures' README
ROWS = []
for path in GOLDEN.glob("*/with_qformer_vs_2023.json"):
    ROWS += read(path.relative_to(GOLDEN))["cases"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case"])
def test_losses(row, tmp_path):
    case = next((case for case in CASES if case["case"] == row["case"]), None)
    if case is None:
        pytest.skip(f"the 2023 set of fixtures has no case {row['case']}")
    model = model_of(case, tmp_path, mask_eos_labels=False).train()
    golden = np.load(FOLDER / case["file"])
    samples = {"image": torch.from_numpy(golden["image"]), "text_input": case["text_input"]}
    inputs = model.build_inputs(samples)[0]
    labels = inputs["labels"]
    assert (labels.tolist() == golden["targets"].tolist()) == row["targets_equal"]
    # the release does not learn the id of its pad token, here that of what is unknown
    learnt = labels.masked_fill(labels == row["pad_token_id"], IGNORED)
    loss = model.llama_model(**inputs | {"labels": learnt}).loss
    assert loss.item() == pytest.approx(row["loss_head"], rel=0, abs=LOSS)
    if torch.equal(learnt, labels):
        assert model(samples)["loss"].item() == pytest.approx(row["loss_head"], rel=0, abs=LOSS)
