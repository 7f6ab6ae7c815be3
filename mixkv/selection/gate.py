"""A gate: a linear function of what is stored of a row that predicts how much a replay of the prompt needs the row.

Its features do not depend on where the row stands. A rotary embedding turns pairs of a key's elements by angles that grow with the
position and leaves the length of each pair as it is, so a gate reads these lengths, and it serves prompts of any length, multimodal
positions and rows stored earlier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..ops.score_reference import token_blocks

# What is predicted is the logarithm of a row's largest weight in the replay plus this: weights below it are alike.
_LEAST = 1e-5
# Added to the diagonal of the normal equations, as a share of it.
_RIDGE = 1e-4
_TINY = 1e-6


@dataclass(frozen=True)
class LayerGate:
    """The gate of one layer.

    Attributes:
        weight: float32 [Hkv, F], of the features.
        partner: int64 [D], the element that a key's element is rotated with; its own index where it is not rotated.
    """

    weight: torch.Tensor
    partner: torch.Tensor

    def to(self, device: torch.device) -> LayerGate:
        return LayerGate(self.weight.to(device), self.partner.to(device))


def features(key: torch.Tensor, value: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """What a gate is a linear function of, float32 [B, Hkv, N, F].

    The length of each pair of rotated elements of the key, or the element itself where it is not rotated; the value; the
    logarithm of the value's norm; the key's norm; 1.

    Args:
        key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv].
        partner: as of `LayerGate`.
    """
    key, value = key.float(), value.float()
    first = (partner >= torch.arange(partner.numel(), device=partner.device)).nonzero().flatten()
    turned = partner[first] != first
    one, other = key[..., first], key[..., partner[first]]
    pairs = torch.where(turned, torch.hypot(one, other), one)
    value_norm = value.norm(dim=-1, keepdim=True).clamp(min=_TINY).log()
    return torch.cat([pairs, value, value_norm, key.norm(dim=-1, keepdim=True), torch.ones_like(value_norm)], dim=-1)


def predict(key: torch.Tensor, value: torch.Tensor, gate: LayerGate) -> torch.Tensor:
    """The largest weight that a replay is expected to give each row, float32 [B, Hkv, N], in [0, 1]."""
    found, weight = torch.empty(key.shape[:3], device=key.device), gate.weight.unsqueeze(-1)
    # A block's features are there beside its keys and values.
    for first, last in token_blocks(key, 3 * weight.shape[1]):
        part = features(key[:, :, first:last], value[:, :, first:last], gate.partner)
        found[:, :, first:last] = (part @ weight).squeeze(-1)
    return found.exp_().sub_(_LEAST).clamp_(0, 1)


class GateFit:
    """Ridge regression in closed form, from the normal equations: what is added can be of any length.

    Args:
        partner: as of `LayerGate`.
    """

    def __init__(self, partner: torch.Tensor):
        self.partner = partner.cpu()
        self._gram: torch.Tensor | None = None
        self._moment: torch.Tensor | None = None

    def add(self, key: torch.Tensor, value: torch.Tensor, replay: torch.Tensor, used: torch.Tensor) -> None:
        """Adds the rows of a prompt.

        Args:
            key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv].
            replay: float32 [B, Hkv, N], the largest weight of each row in the replay.
            used: bool [B, N], False for rows to leave out.
        """
        rows = features(key, value, self.partner.to(key.device)) * used[:, None, :, None]
        wanted = (replay + _LEAST).log().unsqueeze(-1)
        transposed = rows.transpose(-1, -2)
        # On the host: not every device has float64.
        gram, moment = ((transposed @ part).sum(dim=0).cpu().double() for part in (rows, wanted))
        self._gram = gram if self._gram is None else self._gram + gram
        self._moment = moment if self._moment is None else self._moment + moment

    def solve(self) -> LayerGate:
        """The gate, on the CPU."""
        diagonal = self._gram.diagonal(dim1=-2, dim2=-1)
        weight = torch.linalg.solve(self._gram + torch.diag_embed(_RIDGE * diagonal + 1e-12), self._moment)
        return LayerGate(weight.squeeze(-1).float(), self.partner)
