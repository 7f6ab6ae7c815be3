"""The key that each query head attends to most, at a few positions of a prompt, without an attention matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..hf.versions import cache_argument, last_logits_only


@torch.no_grad()
def most_attended(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], positions: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs ``model`` on a prompt and watches its full-attention layers, in order.

    Args:
        inputs: of ``model``, for one prompt without padding: input_ids [1, N], pixel_values and the like.
        positions: R query positions in the prompt, ascending.

    Returns: logits [R, V] of the token after each position; and int64 [L, Hq, R], the position that each head attends to most
        from there, the first one among equals.

    Raises:
        ValueError: the model cannot be compressed, see `mixkv.hf.binding`.
    """
    cache = _WatchingCache(model, method="snapkv", score="attn")
    length = inputs["input_ids"].shape[1]
    at = torch.tensor(positions, device=model.device)
    layers = [layer for layer in cache.layers if isinstance(layer, _WatchingLayer)]
    for layer in layers:
        layer.positions = at
    options = last_logits_only(model, length - positions[0])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**inputs, **cache_argument(cache), use_cache=True, **options).logits[0]
    return logits[(at - length).to(logits.device)], torch.stack([layer.most.cpu() for layer in layers])


def highest(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The position of the key with the largest product with each query, int64 [B, Hq, R].

    Softmax, softcap and sinks do not change the order of the products, so they are left out.

    Args:
        query: [B, Hq, R, D], at ``positions`` [R].
        key: [B, Hkv, N, D].
    """
    batch, heads, count, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size).float()
    product = (grouped @ key.float().transpose(2, 3)).view(batch, heads, count, -1)
    later = torch.arange(key.shape[2], device=key.device) > positions.to(key.device).unsqueeze(-1)
    return product.masked_fill_(later, -torch.inf).argmax(-1)


class _WatchingLayer(MixKVLayer):
    """Records what a prompt attends to, and keeps nothing of it."""

    def compress(self, query, key, value, output, valid, options, measured=None):
        self.most = highest(query[:, :, self.positions.to(query.device)], key, self.positions)[0]


class _WatchingCache(MixKVCache):
    layer_class = _WatchingLayer
