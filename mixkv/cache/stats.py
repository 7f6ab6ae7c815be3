"""What a cache holds, as numbers, as text and as a small picture for notebooks."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

import torch

from .parts import PromptStatistics

# What bytes are of.
_KINDS = (
    *("keys", "values", "scales", "positions", "bookkeeping", "spare"),
    *("bounds", "fetched", "prompt", "statistics", "other_layers"),
)


def stats(cache) -> dict[str, Any]:
    """What `MixKVCache` holds now. In a tensor-parallel model: of the heads of this process.

    Returns: a dict with
        bytes: bytes held, spare capacity and bookkeeping included, all layers: sliding windows and linear-attention states, too;
        bytes_resident: those of resident rows: all but bytes_outside;
        bytes_outside: those of chunks outside the resident rows (``hybridkv`` with ``offload``; on a GPU they lie in the host's
            memory), else 0;
        bytes_keys, bytes_values: by what they are of, those of the rows held, those in chunks included; the kinds from here to
            bytes_other_layers add up to bytes;
        bytes_scales: those of the scales of rows in codes;
        bytes_positions: those of the rows' positions;
        bytes_bookkeeping: those of where rows and chunks lie, and how many there are;
        bytes_spare: those allocated for rows to come, see spare_rows;
        bytes_bounds: those of the bounds by which ``hybridkv`` chooses chunks;
        bytes_fetched: those of copies on the model's device of chunks outside;
        bytes_prompt: those of a prompt that has not been read to its end, or waits for its replay;
        bytes_statistics: those of what is kept to select by: statistics of the prompt, the last queries, scores of rows;
        bytes_other_layers: those of layers that are not compressed: sliding windows and linear-attention states;
        bytes_full: what an uncompressed cache holds after the same tokens; layers that are not compressed count as they are;
        ratio: bytes / bytes_full;
        seen: tokens seen, padding included;
        lengths: per layer an int64 tensor [B, Hkv] of rows held, None for layers that are not compressed; of ``hybridkv`` the
            resident rows, those of slots for chunks included;
        redundancy: per layer a float32 tensor [B, Hkv] as measured on the prompt, None likewise;
        output_norm: per layer what rows were weighed by for the ``output`` scores, ``global`` and ``hybridkv``: ``projection`` (what
            they add through the output projection) or ``value`` (the value's norm: the projection could not be read); else None;
        image_rows, text_rows: per layer int64 [B, Hkv], the rows held of image (and video) tokens and the others, those in
            chunks included; None where no image was read, or where it is not known which tokens are image tokens (see
            `MixKVCache.set_image_mask`);
        redundancy_image, redundancy_text: per layer float32 [B, Hkv], the redundancy of the prompt's image keys and of its
            text keys, each among themselves, nan for a row without them; None likewise;
        rows: rows held by all compressed layers, the sum of lengths; spare_rows: rows allocated in addition, for tokens to come;
        sparsity, dynamic: per layer float32 and bool [B, Hkv], how heads were classified under ``hybridkv``; else None;
        chunks: under ``hybridkv``, of chunks of rows that dynamic heads attended to: steps (query positions so far), and a
            step's mean over all layers and batch rows of chosen, reused (chosen by the position before, too), moved (the
            others, which cross to the device where they are outside) and moved_bytes; None where no head is dynamic;
        prompt_share: under ``budget="auto"``, for every batch row, the share of the first prompt's entries that was kept, windows
            included: a list of floats; else None;
        method, score, budget: from the config.

    Raises:
        RuntimeError: an exception left the cache broken; see `MixKVCache`.
    """
    layers = cache.layers
    held = sum(map(held_bytes, layers))
    kinds = Counter(dict.fromkeys(_KINDS, 0))
    for layer in layers:
        kinds.update(layer.bytes_by_kind if _ours(layer) else {"other_layers": held_bytes(layer)})
    full = sum(map(_full, layers))
    stores = [layer.store for layer in layers if _ours(layer) and layer.store is not None]
    lengths = [layer.lengths() if _ours(layer) else None for layer in layers]
    rows = sum(int(part.sum()) for layer, part in zip(layers, lengths) if part is not None and layer.store is not None)
    kept = [layer.kept() if _ours(layer) else None for layer in layers]
    image_rows = [None if held is None else cache._state.images.count(held) for held in kept]
    outside = sum(layer.nbytes_outside for layer in layers if _ours(layer))
    return {
        "bytes": held,
        "bytes_resident": held - outside,
        "bytes_outside": outside,
        **{f"bytes_{kind}": number for kind, number in kinds.items()},
        "bytes_full": full,
        "ratio": held / full if full else 1.0,
        "seen": seen(cache),
        "lengths": lengths,
        "redundancy": [_measured(layer, "redundancy") for layer in layers],
        "output_norm": [_OUTPUT_NORM[getattr(_statistics(layer), "weighs_output", None)] for layer in layers],
        "image_rows": image_rows,
        "text_rows": [
            None if image is None else torch.tensor([[len(part) for part in row] for row in rows_held]) - image
            for rows_held, image in zip(kept, image_rows)
        ],
        "redundancy_image": [_modal(layer, 0) for layer in layers],
        "redundancy_text": [_modal(layer, 1) for layer in layers],
        "rows": rows,
        "spare_rows": sum(store.spare_rows for store in stores),
        "sparsity": [_measured(layer, "sparsity") for layer in layers],
        "dynamic": [_measured(layer, "dynamic") for layer in layers],
        "chunks": _chunks([layer.chunks for layer in layers if _ours(layer) and layer.chunks is not None]),
        "prompt_share": _prompt_share([layer for layer in layers if _ours(layer)]),
        "method": cache.config.method,
        "score": cache.config.score,
        "budget": cache.config.budget,
    }


def seen(cache) -> int:
    """Tokens seen, padding included."""
    return max((layer.seen for layer in cache.layers if _ours(layer)), default=0)


_OUTPUT_NORM = {True: "projection", False: "value", None: None}


def text(cache) -> str:
    """One line for the prompt."""
    config = cache.config
    name = f"MixKVCache(method={config.method!r}, score={config.score!r}, budget={config.budget}"
    if not cache.layers:
        return name + ", not used yet)"
    # Nothing here waits for a device: a notebook or a debugger may ask at any time.
    if not cache.usable:
        return name + ", broken: call reset())"
    return f"{name}, seen={seen(cache)}, {_size(sum(map(held_bytes, cache.layers)))} of {_size(sum(map(_full, cache.layers)))})"


def html(cache) -> str:
    """A table of totals, and layer x head pictures (first batch row) of rows held and redundancy, darker for more."""
    if not cache.usable:
        return f"<pre>{escape(text(cache))}</pre>"
    numbers = stats(cache)
    rows = [
        ("method, score, budget", f"{numbers['method']}, {numbers['score']}, {numbers['budget']}"),
        ("tokens seen", f"{numbers['seen']:,}"),
        ("held", f"{_size(numbers['bytes'])} of {_size(numbers['bytes_full'])} ({numbers['ratio']:.1%})"),
    ]
    table = "".join(f"<tr><th style='text-align:left'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    pictures = _picture(numbers["lengths"], "rows held", "rgb(30,80,160)", "{:.0f} rows")
    pictures += _picture(numbers["sparsity"], "sparsity", "rgb(60,120,60)", "{:.2f}", most=1.0)
    pictures += _picture(numbers["redundancy"], "redundancy", "rgb(160,80,30)", "{:.2f}", most=1.0)
    return f"<table>{table}</table><div style='display:flex;gap:2em'>{pictures}</div>"


def _picture(layers: list, name: str, colour: str, format: str, most: float | None = None) -> str:
    """Numbers [B, Hkv] a layer as squares, ``most`` (the largest by default) in full colour."""
    grid = [(index, layer[0].tolist()) for index, layer in enumerate(layers) if layer is not None and len(layer)]
    if not grid:
        return ""
    most = most or max(max(row) for _, row in grid) or 1
    side = 12
    cells = "".join(
        f"<rect x='{head * side}' y='{index * side}' width='{side}' height='{side}' fill='{colour}' "
        f"fill-opacity='{number / most:.2f}'><title>layer {index}, head {head}: {format.format(number)}</title></rect>"
        for index, row in grid
        for head, number in enumerate(row)
    )
    width, height = side * max(len(row) for _, row in grid), side * len(layers)
    label = f"{name} per layer and head"
    return (
        f"<figure style='margin:0'><figcaption>{name}</figcaption>"
        f"<svg width='{width}' height='{height}' role='img' aria-label='{label}'>{cells}</svg></figure>"
    )


def _ours(layer) -> bool:
    return hasattr(layer, "nbytes_full")


def _statistics(layer) -> PromptStatistics | None:
    return layer.statistics if _ours(layer) else None


def _measured(layer, name: str) -> torch.Tensor | None:
    found = getattr(_statistics(layer), name, None)
    return None if found is None else found.cpu()


def _chunks(stores: list) -> dict[str, Any] | None:
    """``chunks`` of `stats`."""
    if not stores:
        return None
    steps = max(store.steps for store in stores)
    chosen, moved = (sum(getattr(store, name) for store in stores) for name in ("chosen", "moved"))
    crossed = sum(store.moved * store.chunk_bytes for store in stores)
    mean = max(steps, 1)
    return {
        "steps": steps,
        "chosen": chosen / mean,
        "reused": (chosen - moved) / mean,
        "moved": moved / mean,
        "moved_bytes": crossed / mean,
    }


def _prompt_share(layers: list) -> list[float] | None:
    """``prompt_share`` of `stats`."""
    shares = [_measured(layer, "kept_share") for layer in layers]
    heads = torch.tensor([layer.shape[0] for layer in layers if layer.shape], dtype=torch.float32)
    if not shares or any(share is None for share in shares):
        return None
    return (torch.stack(shares, dim=-1) @ heads / heads.sum()).tolist()


def _modal(layer, kind: int) -> torch.Tensor | None:
    found = _measured(layer, "modal_redundancy")
    return None if found is None else found[..., kind]


def held_bytes(layer) -> int:
    """Bytes of memory that a layer of any kind keeps alive; a stock layer's tensors may be views of larger ones."""
    return layer.nbytes if _ours(layer) else sum(tensor.untyped_storage().nbytes() for tensor in _tensors(layer))


def _full(layer) -> int:
    return layer.nbytes_full if _ours(layer) else sum(tensor.nbytes for tensor in _tensors(layer))


def _tensors(layer) -> list[torch.Tensor]:
    """What a stock layer holds: keys and values, and linear-attention states, which are in dicts since transformers 5.23."""
    held = (getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states"))
    flat = (part for item in held for part in (item.values() if isinstance(item, dict) else [item]))
    return [tensor for tensor in flat if torch.is_tensor(tensor)]


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
