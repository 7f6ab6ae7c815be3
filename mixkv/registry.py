"""Names of methods, scores and back ends."""

from __future__ import annotations

from collections.abc import Callable

import torch

METHODS = ("snapkv", "pyramidkv", "adakv", "sparsemm", "global", "hybridkv")
# Those in which heads of all layers compete by what their rows add to the layers' outputs.
CONTESTS = ("global", "hybridkv")
BACKENDS = ("auto", "native", "varlen", "flash", "torch")
SCORES = ("mix", "mix-fixed", "attn", "vnorm", "knorm", "keydiff", "output", "mix-output")
# Those that weigh attention by what a row adds to the residual stream.
OUTPUT_SCORES = ("output", "mix-output")

# A score of the user's: attention, key, value, redundancy in, one number per candidate out; see `register_score`.
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
registered_scores: dict[str, Score] = {}


def register_score(name: str, function: Score) -> None:
    """Makes ``MixKVConfig(score=name)`` keep the rows for which ``function`` is highest.

    Args:
        name: of the score; registering it again replaces it.
        function: ``function(attention, key, value, redundancy) -> score``, with attention [B, Hkv, M] (pooled window attention,
            float32), key [B, Hkv, N, D] (float32), value [B, Hkv, N, Dv], redundancy [B, Hkv] and score [B, Hkv, M]; the
            candidates are the first M columns, the window the rest. Padding is taken care of.

    Raises:
        ValueError: the name is one of the library's own.
    """
    if name in SCORES:
        raise ValueError(f"score {name!r} is built in: take another name")
    registered_scores[name] = function


def score_names() -> tuple[str, ...]:
    """The scores there are: the library's own and those registered."""
    return *SCORES, *registered_scores
