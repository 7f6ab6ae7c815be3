"""Which key every query head attends to most, at a few columns of a prompt: one reading, no attention matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..cache import MixKVCache
from ..cache.layer import MixKVLayer
from ..hf.versions import cache_argument
from .measure import last_logits_only


@torch.no_grad()
def most_attended(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], columns: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads a prompt and looks at the layers that attend to everything, in their order.

    Args:
        inputs: what ``model`` takes, a batch of one without padding: input_ids [1, N], pixel_values and the like.
        columns: R columns of the prompt, ascending.

    Returns: logits [R, V] of the token after each, and int64 [L, Hq, R], the column that each head attends to most there: of
        those up to it, the first of equals.

    Raises:
        ValueError: a model without such layers, see `mixkv.binding`.
    """
    cache = _WatchingCache(model, method="snapkv", score="attn")
    length = inputs["input_ids"].shape[1]
    at = torch.tensor(columns, device=model.device)
    layers = [layer for layer in cache.layers if isinstance(layer, _WatchingLayer)]
    for layer in layers:
        layer.columns = at
    options = last_logits_only(model, length - columns[0])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**inputs, **cache_argument(cache), use_cache=True, **options).logits[0]
    return logits[(at - length).to(logits.device)], torch.stack([layer.most.cpu() for layer in layers])


def highest(query: torch.Tensor, key: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The key that each query has the largest product with, int64 [B, Hq, R].

    Softmax, soft caps and sinks keep the order of the products, so that none of them is needed.

    Args:
        query: [B, Hq, R, D], of ``columns`` [R].
        key: [B, Hkv, N, D].
    """
    batch, heads, count, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, size).float()
    product = (grouped @ key.float().transpose(2, 3)).view(batch, heads, count, -1)
    later = torch.arange(key.shape[2], device=key.device) > columns.to(key.device).unsqueeze(-1)
    return product.masked_fill_(later, -torch.inf).argmax(-1)


class _WatchingLayer(MixKVLayer):
    """Looks at a prompt instead of keeping rows of it."""

    def compress(self, query, key, value, output, valid, options):
        self.most = highest(query[:, :, self.columns.to(query.device)], key, self.columns)[0]


class _WatchingCache(MixKVCache):
    layer_class = _WatchingLayer
