"""Budgets: how many candidate rows (window excluded) each KV head keeps. Pure functions with exact totals.

Every function returns int64 [B, Hkv] whose sum over a batch row is exactly what the method owes that row: nothing is lost
to rounding, no head gets more rows than it has candidates, and what one head cannot use goes to the others.
"""

from __future__ import annotations

import torch

from ..head_profile import Table


def apportion(shares: torch.Tensor, total: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Whole numbers near ``shares`` that sum to ``total`` and stay within ``limit``: largest-remainder rounding.

    Args:
        shares: [..., H] float, >= 0, summing to about ``total``.
        total: [...] int, at most ``limit.sum(-1)``.
        limit: [..., H] int.

    Returns: [..., H] int64.
    """
    shares, room = shares.double(), limit.double()
    # Each pass hands the surplus of full heads to the rest in proportion to their shares; one more head fills up a pass.
    for _ in range(shares.shape[-1]):
        if not (shares > room).any():
            break
        open_heads = (shares < room).double()
        surplus = (shares - room).clamp(min=0).sum(-1, keepdim=True)
        weight = (shares + 1e-9) * open_heads
        shares = shares.minimum(room) + surplus * weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    shares = shares.minimum(room)
    # Shares such as 95.99999999 mean 96: rounding noise must not decide who gets the remainder.
    whole = (shares + 1e-6).floor().minimum(room)
    missing = total.double().unsqueeze(-1) - whole.sum(-1, keepdim=True)
    fraction = (shares - whole).masked_fill(whole >= room, -1.0)
    rank = fraction.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < missing)).long()


def uniform(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Every head the same (SnapKV, arXiv 2404.14469).

    Args:
        base: [B] int, candidate rows per head on average.
        candidates: [B, Hkv] int, rows to choose from.
    """
    shares = base.double().unsqueeze(-1).expand(candidates.shape)
    return apportion(shares, _total(base, candidates), candidates)


def pyramid(base: torch.Tensor, candidates: torch.Tensor, *, layer_idx: int, num_layers: int, beta: int) -> torch.Tensor:
    """Falling linearly over the layers (PyramidKV, arXiv 2406.02069, equation 3); the layers of a row sum to L * base.

    The first layer's share is ``2 * base - base // beta``, less where the prompt has fewer candidates.
    """
    limit = candidates.amax(dim=-1).double()
    mean = base.double().minimum(limit)
    top = (2 * mean - (base // beta).double()).minimum(limit)
    bottom = 2 * mean - top
    steps = torch.linspace(0, 1, num_layers, dtype=torch.float64, device=base.device)
    shares = top.unsqueeze(-1) + (bottom - top).unsqueeze(-1) * steps
    if num_layers == 1:
        shares = mean.unsqueeze(-1)
    layers = apportion(shares, (mean * num_layers).long(), limit.unsqueeze(-1).expand_as(shares).long())
    return uniform(layers[:, layer_idx], candidates)


def ada(base: torch.Tensor, candidates: torch.Tensor, attention: torch.Tensor, *, floor: float) -> torch.Tensor:
    """Shared out within a layer by attention mass, with a floor (AdaKV, arXiv 2407.11550, algorithm 1).

    The ``Hkv * base`` largest attention scores over all heads, each weighted by its head's share of mass in its top
    ``base``, vote for their heads: n_h votes; a head gets ``(1 - floor) * n_h + floor * base``.

    Args:
        attention: [B, Hkv, M] float32, pooled window attention; 0 or -inf for padding.
    """
    batch, heads, length = attention.shape
    total = _total(base, candidates)
    if length == 0:
        return candidates.clone()
    real = attention.clamp(min=0)
    top = real.topk(min(int(base.max()), length), dim=-1).values
    in_top = torch.arange(top.shape[-1], device=real.device) < base.view(-1, 1, 1)
    concentration = (top * in_top).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1e-30)
    weighted = (real * concentration).masked_fill(attention.isneginf(), -1.0)
    largest = min(int(total.max()), heads * length)
    votes = weighted.flatten(1).topk(largest, dim=-1).indices // length
    counted = (torch.arange(largest, device=real.device) < total.unsqueeze(-1)).double()
    voted = torch.zeros(batch, heads, dtype=torch.float64, device=real.device).scatter_add_(1, votes, counted)
    shares = (1 - floor) * voted + floor * total.double().unsqueeze(-1) / heads
    return apportion(shares, total, candidates)


def from_profile(
    base: torch.Tensor, candidates: torch.Tensor, profile: Table, *, layer_idx: int, num_layers: int, floor: float = 0.1
) -> torch.Tensor:
    """Shared out over the whole model by an offline head profile (SparseMM, arXiv 2506.05344, equation 5).

    A head of layer l gets ``floor * base`` and its share of the rest in proportion to its score.

    Args:
        profile: [num_layers, Hq] (summed over each group) or [num_layers, Hkv].
    """
    batch, heads = candidates.shape
    scores = torch.tensor(profile, dtype=torch.float64, device=base.device)
    if scores.shape[0] != num_layers or scores.shape[1] % heads:
        raise ValueError(
            f"profile has shape {list(scores.shape)}, but the model has {num_layers} compressed layers of {heads} KV heads: "
            f"give a table [{num_layers}, query heads] or [{num_layers}, {heads}]"
        )
    scores = scores.view(num_layers, heads, -1).sum(-1)
    share = (scores / scores.sum()).flatten()
    limit = candidates.amax(dim=-1, keepdim=True).expand(batch, share.numel())
    total = (base * share.numel()).minimum(limit.sum(-1))
    pool = (base.double() * share.numel() * (1 - floor)).unsqueeze(-1)
    model = apportion(share * pool + floor * base.double().unsqueeze(-1), total, limit)
    mine = model.view(batch, num_layers, heads)[:, layer_idx]
    # Heads of one prompt have equally many candidates; when a cache is compressed again they may not.
    return apportion(mine.double(), mine.sum(-1).minimum(candidates.sum(-1)), candidates)


def slots(equal: torch.Tensor, rows: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Chunks that heads attend to in a step: each that has any keeps one, the others are shared out in proportion to ``rows``.

    Args:
        equal: [B, H] int, what they have if none gets more than its neighbours, 0 for heads without chunks.
        rows: [B, H] int, rows they would get under `Votes`.
        limit: [B, H] int, the chunks there are, no fewer than ``equal``.
    """
    certain = (equal > 0).long()
    total = (equal - certain).sum(dim=-1)
    # What is added decides only where nobody has votes.
    weight = (rows.double() + 1e-6) * certain
    shares = total.unsqueeze(-1) * weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return certain + apportion(shares, total, (limit - certain) * certain)


class Votes:
    """Shared out over the whole model by importance, with a floor; layers come one at a time.

    All candidates of all L x Hkv heads compete: the ``L * Hkv * base`` most important vote for their heads, n votes. So do
    those of each layer by themselves: the ``Hkv * base`` most important, m votes. A head gets ``(1 - floor) * v + floor *
    base`` with ``v = (1 - kept) * n + kept * m``, where kept is the share of the candidates that is kept: the fewer rows
    there are, the more go where the model looks most.

    Votes of earlier layers can only fall as later layers arrive, and a head's rows fall with its votes: rows beyond the
    `quota` so far are never needed again. Ties go to the earlier layer, head and column.

    Args:
        floor: the share of the total that every head gets for certain.
    """

    def __init__(self, floor: float):
        self.floor, self.layers = floor, 0
        self.value = self.owner = self._quota = None
        self.within: list[torch.Tensor] = []

    def add(self, base: torch.Tensor, candidates: torch.Tensor, importance: torch.Tensor, *, num_layers: int) -> None:
        """The next layer.

        Args:
            base: [B] int, candidate rows per head on average.
            candidates: [B, Hkv] int, rows to choose from.
            importance: [B, Hkv, M], -inf for padding.
            num_layers: L.

        Raises:
            ValueError: a layer with another number of KV heads than the first.
        """
        batch, heads, _ = importance.shape
        if self.layers == 0:
            self.heads, self.num_layers = heads, num_layers
            self.base = base.minimum(candidates.amax(dim=-1))
            self.total = (self.base * heads * num_layers).tolist()
            self.candidates = candidates
        elif heads != self.heads:
            raise ValueError(
                f"layer {self.layers} has {heads} KV heads and the first has {self.heads}: sharing out over the whole model "
                f"needs the same number in all layers. Use method='adakv'"
            )
        owner = torch.arange(self.layers * heads, (self.layers + 1) * heads, dtype=torch.int32, device=importance.device)
        owner = owner.view(1, heads, 1).expand_as(importance).flatten(1)
        value = importance.flatten(1)
        mine = _largest(value, [total // num_layers for total in self.total]) & ~value.isneginf()
        self.within.append(mine.view_as(importance).sum(dim=-1).double())
        if self.layers > 0:
            # The layers of a model may lie on several devices.
            value = torch.cat([self.value.to(value.device), value], dim=1)
            owner = torch.cat([self.owner.to(owner.device), owner], dim=1)
        # As many in every row, whatever its total: what is too many there `quota` leaves out.
        stay = _largest(value, [max(self.total)] * batch)
        self.value, self.owner = value[stay].view(batch, -1), owner[stay].view(batch, -1)
        self.layers += 1
        self._quota = None

    def quota(self) -> torch.Tensor:
        """[B, layers so far, Hkv] int64: exact when all layers have come, until then no less than what they will get."""
        if self._quota is None:
            self._quota = self._share_out()
        return self._quota

    def _share_out(self) -> torch.Tensor:
        batch, device = self.value.shape[0], self.value.device
        counted = _largest(self.value, self.total) & ~self.value.isneginf()
        votes = torch.zeros(batch, self.layers * self.heads, dtype=torch.float64, device=device)
        votes.scatter_add_(1, self.owner.long(), counted.double())
        within = torch.cat([layer.to(device) for layer in self.within], dim=1)
        base, candidates = self.base.to(device).unsqueeze(-1), self.candidates.to(device)
        most = candidates.amax(dim=-1, keepdim=True)
        # In whole numbers up to the division: heads with equal votes get equal shares, whichever way they came by them.
        votes = ((most - base) * votes + base * within) / most.clamp(min=1)
        shares = (1 - self.floor) * votes + self.floor * base.double()
        limit = candidates.repeat(1, self.layers)
        if self.layers == self.num_layers:
            total = torch.tensor(self.total, device=device)
            rows = apportion(shares, total, limit)
        else:
            # `apportion` rounds up by at most one.
            rows = ((shares + 1e-6).floor().long() + 1).minimum(limit)
        return rows.view(batch, self.layers, self.heads)


def _largest(value: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Bool [B, n], True for the ``counts`` [B] largest of each row of ``value`` [B, n]; of equal ones, the first."""
    size = value.shape[1]
    if min(counts) >= size:
        return torch.ones_like(value, dtype=torch.bool)
    ranked = [min(max(count, 1), size) for count in counts]
    bound = torch.stack([row.topk(rank, sorted=False).values.amin(0, keepdim=True) for row, rank in zip(value, ranked)])
    count = torch.tensor(counts, device=value.device).unsqueeze(-1)
    above = value > bound
    tied = value == bound
    return (above | tied) & (above.sum(dim=-1, keepdim=True) + tied.cumsum(dim=-1) * tied <= count)


def _total(base: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    return (base * candidates.shape[-1]).minimum(candidates.sum(-1))
