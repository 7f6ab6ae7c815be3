"""The strongest oracle: a full stock cache in which the evicted entries are masked out, in plain float32 arithmetic.

Independent of the library: it takes the kept positions and nothing else, and recomputes every decode step's attention
over all keys and values that transformers' own cache holds.
"""

from contextlib import contextmanager

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixkv.hf.binding import _eager as model_eager

_NAME = "masked_oracle"


def keep_masks(cache, columns, batch):
    """Per layer bool [B, Hkv, columns] of what `cache` holds, None for layers it does not compress."""
    masks = []
    for layer in range(len(cache.layers)):
        kept = cache.kept(layer)
        if kept is None:
            masks.append(None)
            continue
        mask = torch.zeros(batch, len(kept[0]), columns, dtype=torch.bool)
        for row, heads in enumerate(kept):
            for head, positions in enumerate(heads):
                mask[row, head, positions[positions < columns].long()] = True
        masks.append(mask)
    return masks


@contextmanager
def masked(model, masks, prompt, stored=None):
    """Within, forwards that come after `prompt` columns do not see the entries that `masks` leave out.

    `stored`: from rows of keys or values [..., D] to what a cache's format holds of them.
    """
    base = model.get_decoder().config._attn_implementation

    def attention(module, query, key, value, attention_mask, **kwargs):
        mask = masks[module.layer_idx] if module.layer_idx < len(masks) else None
        past = key.shape[2] - query.shape[2]
        if mask is None or past < prompt:
            function = model_eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
            return function(module, query, key, value, attention_mask, **kwargs)
        if stored is not None:
            key, value = stored(key), stored(value)
        return naive_attention(query, key, value, mask, past, kwargs), None

    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[base])
    configs = {
        id(m.config): m.config for m in model.get_decoder().modules() if hasattr(m, "layer_idx") and hasattr(m, "config")
    }
    for config in configs.values():
        config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = base


def naive_attention(query, key, value, mask, past, kwargs):
    """One head after the other: [B, Hq, n, D] over [B, Hkv, L, D]; columns beyond the mask are visible causally."""
    batch, heads, new, size = query.shape
    groups = heads // key.shape[1]
    scaling = kwargs.get("scaling") or size**-0.5
    output = torch.zeros(batch, new, heads, value.shape[-1])
    for row in range(batch):
        for head in range(heads):
            for position in range(new):
                seen = torch.zeros(key.shape[2], dtype=torch.bool)
                seen[: mask.shape[2]] = mask[row, head // groups]
                seen[mask.shape[2] : past + position + 1] = True
                k, v = (part[row, head // groups][seen].double() for part in (key, value))
                logits = (k @ query[row, head, position].double()) * scaling
                if kwargs.get("softcap") is not None:
                    logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
                if kwargs.get("s_aux") is not None:
                    logits = torch.cat([logits, kwargs["s_aux"][head].double().view(1)])
                output[row, position, head] = (logits.softmax(-1)[: k.shape[0]] @ v).float()
    return output


def assert_keeps_as_alone(cache, row, alone, pad):
    """Batch row `row`, padded by `pad` columns, holds in every layer and head what the prompt's own cache holds."""
    for layer in range(len(cache.layers)):
        if cache.kept(layer) is None:
            continue
        for kept, kept_alone in zip(cache.kept(layer)[row], alone.kept(layer)[0], strict=True):
            assert torch.equal(kept, kept_alone + pad)


def generate(model, prompts, steps, **options):
    """Greedy tokens [B, steps] and their logits [B, steps, V]."""
    out = model.generate(
        **prompts,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, prompts["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def beams(model, prompts, cache, tokens: int = 8):
    """Four beams of so many tokens: generate's whole output, where a beam's score is the sum of its log-probabilities."""
    return model.generate(
        **prompts,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
