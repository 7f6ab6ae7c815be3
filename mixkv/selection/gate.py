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
    first, turned = _pairs(partner)
    one, other = key[..., first], key[..., partner[first]]
    pairs = torch.where(turned, torch.hypot(one, other), one)
    value_norm = value.norm(dim=-1, keepdim=True).clamp(min=_TINY).log()
    return torch.cat([pairs, value, value_norm, key.norm(dim=-1, keepdim=True), torch.ones_like(value_norm)], dim=-1)


def predict(key: torch.Tensor, value: torch.Tensor, gate: LayerGate) -> torch.Tensor:
    """The largest weight that a replay is expected to give each row, float32 [B, Hkv, N], in [0, 1]."""
    first, turned = _pairs(gate.partner)
    size, value_size = key.shape[3], value.shape[3]
    of_pairs, of_value, of_norms = gate.weight.split([first.numel(), value_size, 3], dim=1)
    # Sums of squares of pairs as a product of matrices: faster than taking elements out of rows.
    members = torch.zeros(size, first.numel(), device=key.device)
    members[first, torch.arange(first.numel(), device=key.device)] = 1.0
    members[gate.partner[first], torch.arange(first.numel(), device=key.device)] = 1.0
    members, of_turned = members[:, turned], of_pairs[:, turned]
    of_key = torch.zeros(key.shape[1], size, device=key.device)
    of_key[:, first[~turned]] = of_pairs[:, ~turned]
    found = torch.empty(key.shape[:3], device=key.device)
    for start, end in token_blocks(key, 3 * size + value_size):
        keys, values = key[:, :, start:end].float(), value[:, :, start:end].float()
        squares = keys.square()
        part = _along(of_turned, (squares @ members).sqrt_()) + _along(of_value, values)
        if not turned.all():
            part += _along(of_key, keys)
        value_norm = torch.linalg.vector_norm(values, dim=-1).clamp_(min=_TINY).log_()
        part += of_norms[:, :1] * value_norm + of_norms[:, 1:2] * squares.sum(dim=-1).sqrt_() + of_norms[:, 2:]
        found[:, :, start:end] = part
    return found.exp_().sub_(_LEAST).clamp_(0, 1)


def _along(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sums [B, Hkv, N] of rows [B, Hkv, N, n] by weights [Hkv, n]: as a row times a matrix, which torch does faster."""
    return (weight.unsqueeze(1) @ rows.transpose(-1, -2)).squeeze(2)


def _pairs(partner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first element of each pair, unrotated elements by themselves, int64 [P]; and which of them are pairs, bool [P]."""
    first = (partner >= torch.arange(partner.numel(), device=partner.device)).nonzero().flatten()
    return first, partner[first] != first


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
