"""The strongest oracle: a full stock cache in which the evicted entries are masked out, in plain float32 arithmetic.

Independent of the library: it takes the kept positions and nothing else, and recomputes every decode step's attention
over all keys and values that transformers' own cache holds, the values of kept entries refitted if they are to be.
"""

from contextlib import contextmanager

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mixkv.hf.binding import _eager as model_eager
from mixkv.selection.refit import FOLDS, RIDGES

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
def masked(model, masks, prompt, refit_window=None, stored=None):
    """Within, forwards that come after `prompt` columns do not see the entries that `masks` leave out.

    `refit_window`: how many of the prompt's last queries the values of kept entries are refitted to; None: they are not.
    `stored`: from rows of keys or values [..., D] to what a cache's format holds of them; None: the rows themselves.
    """
    base = model.get_decoder().config._attn_implementation
    refitted = {}

    def attention(module, query, key, value, attention_mask, **kwargs):
        mask = masks[module.layer_idx] if module.layer_idx < len(masks) else None
        past = key.shape[2] - query.shape[2]
        if mask is None or past < prompt:
            if mask is not None and refit_window is not None:
                refitted[module.layer_idx] = refit_values(query, key, value, mask, refit_window, kwargs)
            function = model_eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
            return function(module, query, key, value, attention_mask, **kwargs)
        if refit_window is not None:
            value = torch.cat([refitted[module.layer_idx], value[:, :, prompt:]], dim=2)
        if stored is not None:
            key, value = stored(key), stored(value)
        return naive_attention(query, key, value, mask, past, kwargs), None

    with replaced(model, attention):
        yield


@contextmanager
def replaced(model, attention):
    """Within, all layers of the decoder use this ``attention`` function."""
    base = model.get_decoder().config._attn_implementation
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
    batch, heads, new, _ = query.shape
    groups = heads // key.shape[1]
    output = torch.zeros(batch, new, heads, value.shape[-1])
    for row in range(batch):
        for head in range(heads):
            for position in range(new):
                seen = torch.zeros(key.shape[2], dtype=torch.bool)
                seen[: mask.shape[2]] = mask[row, head // groups]
                seen[mask.shape[2] : past + position + 1] = True
                k, v = (part[row, head // groups][seen].double() for part in (key, value))
                output[row, position, head] = (weights(query[row, head, position], k, head, kwargs) @ v).float()
    return output


def weights(query, key, head, kwargs):
    """Attention weights [L] of one query [D] of query head `head` over keys [L, D], in float64."""
    logits = (key.double() @ query.double()) * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    if kwargs.get("softcap") is not None:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    if kwargs.get("s_aux") is not None:
        logits = torch.cat([logits, kwargs["s_aux"][head].double().view(1)])
    return logits.softmax(-1)[: key.shape[0]]


def refit_values(query, key, value, mask, window, kwargs):
    """The values [B, Hkv, N, Dv] of a prompt, those of entries that `mask` keeps refitted to the last `window` queries."""
    changed, length = value.clone(), key.shape[2]
    groups, count = query.shape[1] // key.shape[1], query.shape[2]
    for row in range(value.shape[0]):
        for head in range(value.shape[1]):
            kept = mask[row, head].nonzero().flatten()
            if len(kept) == length:
                continue
            given, output = [], []
            for token in range(length - window, length):
                for group in range(groups):
                    of_head = head * groups + group
                    asked = query[row, of_head, token - (length - count)]
                    seen = kept[kept <= token]
                    given.append(torch.zeros(len(kept), dtype=torch.float64))
                    given[-1][: len(seen)] = weights(asked, key[row, head, seen], of_head, kwargs)
                    whole = weights(asked, key[row, head, : token + 1], of_head, kwargs)
                    output.append(whole @ value[row, head, : token + 1].double())
            folds = torch.arange(window).repeat_interleave(groups) // -(-window // FOLDS)
            fitted = refit_head(torch.stack(given), torch.stack(output), value[row, head, kept].double(), folds)
            changed[row, head, kept] = fitted.to(value.dtype)
    return changed


def refit_head(given, output, value, folds):
    """Values [L, Dv] whose sums by weights `given` [R, L] are close to `output` [R, Dv]; row r is held out in fold `folds[r]`."""

    def fit(rows, ridge):
        a, missing = given[rows], (output - given @ value)[rows]
        identity = torch.eye(given.shape[1], dtype=torch.float64)
        return value + torch.linalg.solve(a.T @ a + ridge * identity, a.T @ missing)

    def error(rows, candidate):
        return (output - given @ candidate)[rows].square().sum()

    everything = torch.ones_like(folds, dtype=torch.bool)
    ridges = [ridge * given.square().sum(-1).mean() for ridge in RIDGES]
    held_out = [sum(error(folds == fold, fit(folds != fold, ridge)) for fold in range(FOLDS)) for ridge in ridges]
    best = min(range(len(ridges)), key=held_out.__getitem__)
    return fit(everything, ridges[best]) if held_out[best] < error(everything, value) else value


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


NEVER = 1 << 40


class EvictionTimes:
    """When a cache evicted each entry: a query at position q sees the entry of position k if k <= q < times[..., k].

    ``layers``: int64 [B, Hkv, positions] for every layer, None for those that are not compressed.
    """

    def __init__(self, cache, batch):
        self.cache, self.batch, self.layers = cache, batch, None

    def note(self, end):
        """To be called after a compression that came with the token before position ``end``, and before the next one."""
        held = keep_masks(self.cache, end, self.batch)
        before = self.layers or [None] * len(held)
        self.layers = [None if mask is None else self._noted(old, mask, end) for old, mask in zip(before, held)]

    @staticmethod
    def _noted(old, mask, end):
        times = torch.full(mask.shape, NEVER)
        if old is not None:
            times[..., : old.shape[-1]] = old
            assert not (mask & (times != NEVER)).any(), "an entry that was evicted is held again"
        return times.masked_fill(~mask & (times == NEVER), end)


@contextmanager
def masked_by_time(model, layers):
    """Within, a query does not see entries that had been evicted before it: ``layers`` of `EvictionTimes`."""
    base = model.get_decoder().config._attn_implementation

    def attention(module, query, key, value, attention_mask, **kwargs):
        times = layers[module.layer_idx] if module.layer_idx < len(layers) else None
        if times is None:
            function = model_eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
            return function(module, query, key, value, attention_mask, **kwargs)
        return timed_attention(query, key, value, attention_mask, times, kwargs), None

    with replaced(model, attention):
        yield


def timed_attention(query, key, value, mask, times, kwargs):
    """[B, n, Hq, Dv] in float64, every query over the entries that it sees."""
    new, total, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    places = torch.arange(total)
    at = places[total - new :].unsqueeze(-1)
    times = torch.nn.functional.pad(times, (0, max(total - times.shape[-1], 0)), value=NEVER)[..., :total]
    seen = at < times.unsqueeze(-2)
    seen = seen & (places <= at if mask is None else mask if mask.dtype == torch.bool else mask == 0)
    logits = query.double() @ key.double().repeat_interleave(groups, 1).mT * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    if kwargs.get("softcap") is not None:
        logits = kwargs["softcap"] * torch.tanh(logits / kwargs["softcap"])
    logits = logits.masked_fill(~seen.repeat_interleave(groups, 1), -torch.inf)
    if kwargs.get("s_aux") is not None:
        sinks = kwargs["s_aux"].double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(dim=-1)[..., :total].nan_to_num()
    return (weights @ value.double().repeat_interleave(groups, 1)).transpose(1, 2).to(query.dtype)
