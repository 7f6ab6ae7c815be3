"""HybridKV-style heads (after arXiv 2604.05887): sparse heads are pruned, the others keep all entries in chunks."""

from __future__ import annotations

import numpy as np

from ...config import MixKVConfig
from ...registry import Method, add
from ..global_budget import ChunkBudget, layer_exponent
from ..hybrid import plan


def new_budget(config: MixKVConfig, num_layers: int, patient: bool = False, limits: np.ndarray | None = None) -> ChunkBudget:
    """The chunks a step that the layers of one prompt share; entries are never evicted late, ``patient`` or not."""
    return ChunkBudget(num_layers, config.hybrid_floor, layer_exponent(config))


add(
    Method(
        "hybridkv",
        description="sparse heads pruned; the others keep all entries in chunks and attend to some of them",
        paper="2604.05887",
        new_budget=new_budget,
        plan=plan,
        options=(
            "hybrid_threshold",
            "hybrid_floor",
            "hybrid_chunk",
            "hybrid_first",
            "hybrid_last",
            "layer_exponent",
            "offload",
        ),
        uses_importance=True,
        uses_output_importance=True,
        decode_budget=False,
        turns=False,
        tensor_parallel=False,
    )
)
