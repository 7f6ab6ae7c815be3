"""Which elements of a key are rotated together: what a gate reads of a key does not depend on its position."""

import pytest
import torch
import transformers
from support import zoo

from mixkv.hf import binding, rotary
from mixkv.selection.gate import features

TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)
DYNAMIC = dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
OTHERS = {
    "yarn": lambda: transformers.LlamaConfig(**TINY, rope_parameters=YARN),
    "dynamic NTK": lambda: transformers.LlamaConfig(**TINY | dict(max_position_embeddings=32), rope_parameters=DYNAMIC),
    "interleaved": lambda: transformers.CohereConfig(**TINY),
    "half of a key, interleaved": lambda: transformers.GlmConfig(**TINY, head_dim=16),
    "part of a key": lambda: transformers.PhiConfig(**TINY, partial_rotary_factor=0.25),
    "part of a key, found by the function": lambda: transformers.Phi3Config(**TINY, partial_rotary_factor=0.5),
    "some layers": lambda: transformers.SmolLM3Config(**TINY, no_rope_layers=[0, 1]),
}


@torch.no_grad()
def keys_and_values(model, first):
    """Of 24 tokens whose positions start at `first`."""
    decoder, cache = model.get_decoder(), transformers.DynamicCache(config=model.config)
    ids = torch.randint(4, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    position_ids = torch.arange(first, first + 24).unsqueeze(0)
    decoder(input_ids=ids, position_ids=position_ids, past_key_values=cache, use_cache=True)
    return [None if layer.keys is None else (layer.keys, layer.values) for layer in cache.layers]


def check(model):
    modules, slots = binding.attention_modules(model), binding.slots(model)
    compressed = [index for index, slot in enumerate(slots) if slot is None]
    moved = 0.0
    for index, (one, other) in enumerate(zip(keys_and_values(model, 0), keys_and_values(model, 37))):
        if index not in compressed:
            continue
        partner = rotary.partners(modules[index], one[0].shape[-1])
        found, again = features(*one, partner), features(*other, partner)
        assert found.shape[-1] == (partner >= torch.arange(len(partner))).sum() + one[1].shape[-1] + 3
        assert (found - again).abs().max() <= 1e-3 * found.abs().max()
        moved = max(moved, float((one[0] - other[0]).abs().max()))
    return moved


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family(name):
    assert check(zoo.build(name, zoo.FAMILIES[name].attn[-1])) > 0.1, "no key depends on its position: the test shows nothing"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_rotary_embeddings(kind):
    torch.manual_seed(0)
    config = OTHERS[kind]()
    # With a long prompt of its own, dynamic NTK turns pairs by other angles: their lengths stay.
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert check(model) > 1e-2


def test_pairs_are_those_of_the_model():
    half = rotary.partners(binding.attention_modules(zoo.build("llama"))[0], 16)
    assert half.tolist() == [*range(8, 16), *range(8)]
    interleaved = transformers.AutoModelForCausalLM.from_config(OTHERS["interleaved"]())
    assert rotary.partners(binding.attention_modules(interleaved)[0], 16)[:4].tolist() == [1, 0, 3, 2]
    part = transformers.AutoModelForCausalLM.from_config(OTHERS["part of a key"]())
    assert rotary.partners(binding.attention_modules(part)[0], 16).tolist() == [2, 3, 0, 1, *range(4, 16)]


def test_no_rotary_embedding_and_an_unknown_one():
    module = torch.nn.Module()
    module.config = transformers.LlamaConfig(**TINY)
    assert rotary.partners(module, 16).tolist() == list(range(16))
    llama4 = transformers.models.llama4.modeling_llama4
    text = transformers.Llama4TextConfig(**TINY, head_dim=16)
    with pytest.raises(ValueError, match="does not know how Llama4TextAttention rotates"):
        rotary.partners(llama4.Llama4TextAttention(text, 0), 16)
