"""Tiny random models in which full-attention layers alternate with linear-attention ones."""

import pytest
import torch
import transformers

from mixkv.hf import stock_layers
from support import zoo

_COMMON = dict(
    vocab_size=zoo.VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def lfm2(*kinds):
    """Convolutions and attention: ``kinds`` of layers are "conv" and "full_attention"."""
    config = transformers.Lfm2Config(**_COMMON, num_hidden_layers=len(kinds), layer_types=list(kinds))
    return _build(transformers.Lfm2ForCausalLM, config)


def granite(*kinds):
    """State-space layers (Mamba 2) and attention: ``kinds`` of layers are "mamba" and "attention"."""
    config = transformers.GraniteMoeHybridConfig(
        **_COMMON,
        num_hidden_layers=len(kinds),
        layer_types=list(kinds),
        num_local_experts=0,
        shared_intermediate_size=96,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
        attention_multiplier=0.25,
        position_embedding_type="rope",
    )
    return _build(transformers.GraniteMoeHybridForCausalLM, config)


def _build(model_class, config):
    if not any(type(layer).__name__ == "LinearAttentionLayer" for layer in stock_layers.of_decoder(config)):
        pytest.skip("this transformers keeps the states elsewhere")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()
