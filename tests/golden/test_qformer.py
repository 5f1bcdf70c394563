"""The Q-Former gives the hidden states of the 2023 release (golden set b), and runs in half precision."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minigpt4.models.vision.qformer import (
    QFormerConfig,
    build_qformer,
    from_release_name,
    to_release_name,
)
from tests.golden import GOLDEN
from tests.golden.model import qformer_fields

FOLDER = GOLDEN / "b_qformer"
DESCRIPTION = json.loads((FOLDER / "config.json").read_text())
DIMS = QFormerConfig(**qformer_fields(DESCRIPTION))
IO = np.load(FOLDER / "io.npz")
CASES = [case["case"] for case in DESCRIPTION["cases"]]
ATOL = 1e-5  # float32 noise: 3.1e-6 against float64, 2.3e-6 between torch versions


@pytest.fixture(scope="module")
def qformer():
    tensors = load_file(FOLDER / "weights.safetensors")
    names = {
        from_release_name(name).removeprefix("Qformer."): tensor for name, tensor in tensors.items()
    }
    qformer = build_qformer(DIMS)
    own = {name: names[name] for name in qformer.state_dict()}
    qformer.load_state_dict(own, assign=True)
    return qformer.eval()


def inputs(case):
    queries, images = torch.from_numpy(IO["query_tokens"]), torch.from_numpy(IO["image_embeds"])
    return {
        "query_embeds": queries.expand(len(images), -1, -1),
        "encoder_hidden_states": images,
        "encoder_attention_mask": torch.from_numpy(IO[f"mask_{case}"]),
    }


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hidden_states(qformer, case):
    output = qformer.bert(**inputs(case), output_hidden_states=True)
    found = torch.stack(output.hidden_states).numpy()
    np.testing.assert_allclose(found, IO[f"hidden_states_{case}"], rtol=0, atol=ATOL)
    np.testing.assert_allclose(
        output.last_hidden_state, IO[f"last_hidden_state_{case}"], rtol=0, atol=ATOL
    )


@torch.no_grad()
def test_without_a_mask_all_tokens_are_seen(qformer):
    given = inputs("all_ones")
    found = qformer(torch.from_numpy(IO["query_tokens"]), given["encoder_hidden_states"])
    np.testing.assert_allclose(found, IO["last_hidden_state_all_ones"], rtol=0, atol=ATOL)


@torch.no_grad()
def test_it_computes_in_half_precision_under_autocast(qformer):
    types = set()
    hook = qformer.bert.encoder.layer[0].intermediate_query.dense.register_forward_hook(
        lambda module, args, output: types.add(output.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = qformer(torch.from_numpy(IO["query_tokens"]), torch.from_numpy(IO["image_embeds"]))
    hook.remove()
    assert types == {torch.bfloat16}
    # bfloat16 keeps 8 bits: 0.4 % a step of values up to 4, over five layers
    np.testing.assert_allclose(found.float(), IO["last_hidden_state_all_ones"], rtol=0, atol=0.15)


def test_names_lead_back_and_forth(qformer):
    released = [f"Qformer.{name}" for name in DESCRIPTION["keys"] if "position_ids" not in name]
    ours = [f"Qformer.{name}" for name in qformer.state_dict()]
    assert sorted(map(to_release_name, ours)) == sorted(released)
    assert [from_release_name(to_release_name(name)) for name in ours] == ours
