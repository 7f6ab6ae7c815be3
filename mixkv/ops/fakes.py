"""What the compiled operations return, for tracing: shapes and dtypes without numbers."""

from __future__ import annotations

import torch


def register() -> None:
    """Shapes and dtypes of the results, for tracing."""

    def decode(query, value_buffer):
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_buffer.shape[1])

    def nothing(*args):
        return None

    def window(query, key, *rest):
        return key.new_empty(key.shape[0], key.shape[1], key.shape[2] - query.shape[2], dtype=torch.float32)

    def numbers(rows):
        return rows.new_empty(rows.shape[:3], dtype=torch.float32)

    def chosen(ranks, count):
        size = torch.library.get_ctx().new_dynamic_size()
        return [ranks.new_empty(size) for _ in range(count)]

    def scales(key, rows, coded):
        return [key.new_empty(rows if coded else 0, dtype=torch.float16) for _ in range(2)]

    def evicted(key, value, position, starts, lengths, key_scale, value_scale, ranks, *rest):
        rows = torch.library.get_ctx().new_dynamic_size()
        buffers = [part.new_empty(rows, *part.shape[1:]) for part in (key, value, position)]
        buffers += [starts.new_empty(starts.shape), lengths.new_empty(lengths.shape)]
        return (*buffers, *scales(key, rows, key_scale is not None), *chosen(ranks, 1))

    def gathered(key, value, positions, counts, codes, rotate, pack, *rest):
        rows = torch.library.get_ctx().new_dynamic_size()
        dtype = torch.uint8 if pack else torch.int8 if codes else key.dtype
        buffers = [part.new_empty(rows, part.shape[3] // (2 if pack else 1), dtype=dtype) for part in (key, value)]
        sequences = [positions.new_empty(counts.numel()) for _ in range(2)]
        return (*buffers, positions.new_empty(rows), *sequences, *scales(key, rows, codes))

    def merged(value, owner, within, importance, *rest):
        kept, batch = torch.library.get_ctx().new_dynamic_size(), value.shape[0]
        heads = within.shape[1] + importance.shape[1]
        return (value.new_empty(batch, kept), owner.new_empty(batch, kept), *(within.new_empty(batch, heads) for _ in range(3)))

    fakes = {
        "append": nothing,
        "compact": nothing,
        "move_rows": nothing,
        "attend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "append_attend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "step": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "attend_extend": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "chunk_scores": lambda query, codes, grid, starts, counts, longest: query.new_empty(
            starts.numel(), longest, dtype=torch.float32
        ),
        "attend_chunks": lambda query, key_buffer, value_buffer, *rest: decode(query, value_buffer),
        "fetch_chunks": nothing,
        "window_scores": window,
        "importance": window,
        "row_norms": numbers,
        "diversity": lambda key, valid: (numbers(key), key.new_empty(key.shape[:2], dtype=torch.float32)),
        "match": lambda raw, reference, valid: raw.new_empty(raw.shape),
        "places": lambda score: (
            score.new_empty(score.shape, dtype=torch.int32),
            score.new_empty(score.shape[:2], dtype=torch.bool),
        ),
        "ada_counts": lambda importance, base, totals: base.new_empty(importance.shape[:2]),
        "take": lambda ranks, entries, window, width: (*chosen(ranks, 2), entries.new_empty(entries.shape)),
        "mix": lambda importance, *rest: importance.new_empty(importance.shape),
        "normalized": lambda importance, exponent: importance.new_empty(importance.shape),
        "gather": gathered,
        "merge_largest": merged,
        "evict": evicted,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"mixkv::{name}", fake)
