"""Options that decide how much each layer and head keeps, and which positions."""

import pytest
import torch
from support import zoo

from mixkv import MixKVCache, MixKVConfig, select
from mixkv.selection import rank


def draw(length=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, 4, 8, 16), (1, 2, length, 16), (1, 2, length, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def entries_of_layers(scaled, exponent):
    """Entries that each layer of a model keeps, whose second layer writes ``scaled`` times as much into the residual stream."""
    model = zoo.build("llama")
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.o_proj.weight.mul_(scaled)
        # The layers after it read the same whatever it writes.
        for name in ("q_proj", "k_proj"):
            getattr(model.get_decoder().layers[2].self_attn, name).weight.zero_()
        cache = MixKVCache(model, score="attn", budget=20, window=6, global_floor=0.0, layer_exponent=exponent)
        model(**zoo.inputs("llama", 80), past_key_values=cache)
    return [int(lengths.sum()) for lengths in cache.stats()["lengths"]]


def test_layer_exponent_makes_layers_alike():
    before, after = entries_of_layers(1.0, 0.0), entries_of_layers(100.0, 0.0)
    assert after[1] > before[1]
    before, after = entries_of_layers(1.0, 1.0), entries_of_layers(100.0, 1.0)
    assert after[1] == pytest.approx(before[1], abs=4)


@pytest.mark.parametrize("width", [1, 3, 9])
def test_output_kernel_size_is_the_width_of_max_pooling(width):
    config = MixKVConfig(method="adakv", score="output", budget=20, window=8, output_kernel_size=width)
    raw = rank(*draw(), config.replace(output_kernel_size=1)).importance
    padded = torch.nn.functional.pad(raw, (width // 2, width // 2))
    assert torch.equal(rank(*draw(), config).importance, padded.unfold(-1, width, 1).amax(-1))


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_sparsemm_floor_goes_out_in_equal_parts(floor):
    """Of 2 * 20 entries beside the window the first head's profile asks for all; a head has 52."""
    config = MixKVConfig(method="sparsemm", profile=[[21.0, 1.0]], budget=28, window=8, sparsemm_floor=floor)
    lengths = select(*draw(), config).lengths[0].tolist()
    expected = 8 + floor * 20 + (1 - floor) * 40 * 21 / 22
    assert abs(lengths[0] - expected) < 1 and sum(lengths) == 56


@pytest.mark.parametrize("first, last", [(0, 1), (4, 8), (7, 3)])
def test_hybrid_first_and_last_are_always_resident(first, last):
    """What is in no chunk: the first tokens, the last, and what is left of the budget just before these."""
    config = MixKVConfig(
        method="hybridkv", budget=40, window=8, hybrid_threshold=1.0, hybrid_first=first, hybrid_last=last, hybrid_chunk=6
    )
    for positions in select(*draw(length=120), config).positions[0]:
        kept = set(positions.tolist())
        assert kept == set(range(first)) | set(range(120 - (len(kept) - first), 120))
        assert 0 <= len(kept) - first - last < 6
