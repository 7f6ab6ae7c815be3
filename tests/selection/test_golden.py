"""Selections against what the method's authors' public implementation keeps (see tests/data/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mixkv import MixKVConfig, select

GOLDEN = Path(__file__).parents[1] / "data" / "reference_selection.safetensors"
SCORE = {"mixkv": "mix-fixed", "headwisemixkv": "mix", "headwisemixkv_online": "mix"}

with safe_open(GOLDEN, "pt") as file:
    CASES = json.loads(file.metadata()["cases"])


def _case_id(case):
    return "-".join(str(case[name]) for name in ("name", "allocation", "select", "capacity"))


@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_selection_equals_reference(case):
    with safe_open(GOLDEN, "pt") as file:
        query, key, value = (file.get_tensor(f"in{case['input']}.{name}") for name in "qkv")
        expected = file.get_tensor(f"{case['name']}.kept").split(case["lens"])
    config = MixKVConfig(
        method=case["allocation"],
        score=SCORE.get(case["select"], case["select"]),
        budget=case["capacity"],
        window=case["window"],
        kernel_size=case["kernel"],
        pooling=case["pooling"].removesuffix("pool"),
        group_reduce=case["gqa"],
        **({"pyramid_beta": case["beta"]} if case["beta"] else {}),
        **({"ada_floor": case["floor"]} if case["floor"] else {}),
    )
    redundancy = torch.tensor(case["head_redundancy"]) if case["select"] == "headwisemixkv" else None
    layer = {"layer_idx": case["layer"], "num_layers": case["num_layers"]}

    free = select(query, key, value, config, redundancy=redundancy, **layer)
    reference_lengths = torch.tensor([case["lens"]])
    if case["allocation"] == "snapkv":
        assert torch.equal(free.lengths, reference_lengths)
    if case["allocation"] == "adakv":
        assert (free.lengths - reference_lengths).abs().max() <= 1
        assert free.lengths.sum() == free.lengths.numel() * case["capacity"]

    forced = select(query, key, value, config, redundancy=redundancy, lengths=reference_lengths, **layer)
    for kept, want in zip(forced.positions[0], expected, strict=True):
        assert torch.equal(kept, want)
    if case["select"] == "headwisemixkv_online":
        online = torch.tensor(case["online_redundancy"]).clamp(0, 1)
        assert torch.allclose(free.redundancy[0], online, atol=1e-5)
