"""PendingRefit: what is needed of a layer's prompt to refit the values of its rows once it is known which rows stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ops.arguments import LogitOptions
from ..selection.refit import Reference, attention_output, refit
from ..storage.packed import Store


@dataclass(frozen=True)
class PendingRefit:
    """The reference queries of a layer's prompt, with their outputs over all of its rows.

    Attributes:
        references: the queries.
        real: int64 [B], the prompt's real tokens.
    """

    references: Sequence[Reference]
    real: torch.Tensor

    @classmethod
    def of_prompt(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        valid: torch.Tensor | None,
        logits: LogitOptions,
        window: int,
        asked: torch.Tensor | None = None,
    ) -> PendingRefit:
        """With the queries of the last ``window`` tokens of a prompt as references, and those of its replay.

        The other arguments are those of `mixkv.cache.compress.Compressor.compress`; where ``output`` is of fewer tokens (a prompt
        read in pieces), it is computed.

        Args:
            asked: [B, Hq, n, D], queries of tokens that came after the whole prompt; None: there are none.
        """
        batch, _, length, _ = key.shape
        window = min(window, length)
        query = query[:, :, query.shape[2] - window :].detach()
        if output.shape[1] >= window:
            output = output[:, output.shape[1] - window :].detach()
        else:
            output = attention_output(query, key, value, valid, logits)
        real = torch.full((batch,), length, device=key.device) if valid is None else valid.sum(dim=-1)
        # Copies: the queries and outputs of the whole prompt need not stay.
        first, own = length - window, None if valid is None else valid[:, length - window :].clone()
        references = [Reference(query.clone(), output.clone(), first, own)]
        if asked is not None:
            references.append(Reference(asked, attention_output(asked, key, value, valid, logits, after=True)))
        return cls(references, real)

    def apply(self, store: Store, logits: LogitOptions, dynamic: torch.Tensor | None = None) -> None:
        """Refits the values in ``store`` of heads that lost rows; ``dynamic`` bool [B, Hkv]: heads to leave as they are."""
        lost = store.lengths.view(store.batch, store.heads) < self.real.unsqueeze(-1)
        lost = lost if dynamic is None else lost & ~dynamic
        if not lost.any():
            return
        key, value, held = store.padded()
        store.replace_values(refit(self.references, key, value, store.padded_positions(), held, logits), lost)
