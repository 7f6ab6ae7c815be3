"""What a model's decoder is given while it reads a prompt, and parts of it as the inputs of another forward."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn

# Of mllama: one row a token, in dimension 2.
_CROSS = ("cross_attention_mask", "full_text_row_masked_out_mask")


class DecoderInputs:
    """The inputs of a decoder for the tokens of a prompt [B, N], forward by forward.

    Token ids [B, N] or embeddings [B, N, E], whichever the decoder was given; position ids [B, N], or [K, B, N] of multimodal
    rotary embeddings; and what some models add to the hidden states of images.
    """

    def __init__(self) -> None:
        self._forwards: list[dict[str, torch.Tensor]] = []
        self._deepstack: list[list[torch.Tensor]] = []

    def append(self, arguments: dict[str, Any], start: int) -> None:
        """A forward of the decoder with these arguments is about to read tokens from position ``start`` of the sequence on."""
        ids, embeddings = arguments.get("input_ids"), arguments.get("inputs_embeds")
        tokens = ids if embeddings is None else embeddings
        batch, count = tokens.shape[:2]
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(start, start + count, device=tokens.device)
        if positions.ndim == 1:
            positions = positions.view(1, -1)
        found = {"tokens": tokens.detach(), "positions": positions.expand(*positions.shape[:-2], batch, count)}
        found |= {name: arguments[name] for name in _CROSS if arguments.get(name) is not None}
        deepstack = arguments.get("deepstack_visual_embeds")
        if deepstack is not None:
            # The row of the visual embeddings that belongs to a token, -1 for text.
            mask = arguments["visual_pos_masks"]
            before = sum(part[0].shape[0] for part in self._deepstack)
            rows = mask.flatten().long().cumsum(0).view_as(mask) - 1 + before
            found["visual"] = rows.masked_fill(~mask, -1)
            self._deepstack.append([part.detach() for part in deepstack])
        else:
            found["visual"] = torch.full((batch, count), -1, device=tokens.device)
        self._forwards.append(found)

    def __len__(self) -> int:
        return sum(part["tokens"].shape[1] for part in self._forwards)

    def join(self) -> None:
        """Makes one forward of those that came."""
        if len(self._forwards) > 1:
            dims = {"tokens": 1, "positions": -1, "visual": 1} | dict.fromkeys(_CROSS, 2)
            names = self._forwards[0]
            self._forwards = [{name: torch.cat([part[name] for part in self._forwards], dims[name]) for name in names}]
            if self._deepstack:
                self._deepstack = [[torch.cat(parts) for parts in zip(*self._deepstack)]]

    def take(self, index: torch.Tensor) -> dict[str, Any]:
        """Arguments of a decoder that reads tokens ``index`` (int64 [B, n]) of the prompt again, at positions after the prompt."""
        (held,) = self._forwards
        tokens = held["tokens"]
        index = index.to(tokens.device)
        if tokens.ndim == 2:
            arguments: dict[str, Any] = {"input_ids": tokens.gather(1, index)}
        else:
            arguments = {"inputs_embeds": tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))}
        arguments["position_ids"] = _continued(held["positions"], index.to(held["positions"].device))
        if self._deepstack:
            rows = held["visual"].gather(1, index.to(held["visual"].device))
            arguments["visual_pos_masks"] = rows >= 0
            arguments["deepstack_visual_embeds"] = [part[rows[rows >= 0].to(part.device)] for part in self._deepstack[0]]
        for name in _CROSS:
            if name in held:
                chosen = index.to(held[name].device)[:, None, :, None]
                arguments[name] = held[name].gather(2, chosen.expand(-1, 1, -1, held[name].shape[3]))
        return arguments


def _continued(positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Positions of tokens ``index`` [B, n] read again, after all ``positions`` [..., B, N] and as far apart as they were."""
    stacked = positions if positions.ndim == 3 else positions.unsqueeze(0)
    # Qwen-VL gives positions in the text before the three of its rotary embedding.
    parts = stacked.split([1, 3]) if stacked.shape[0] == 4 else [stacked]
    found = []
    for part in parts:
        again = part.gather(2, index.expand(part.shape[0], -1, -1))
        after = part.amax(dim=(0, 2), keepdim=True) + 1
        found.append(again - again.amin(dim=(0, 2), keepdim=True) + after)
    return torch.cat(found).view(*positions.shape[:-1], -1)


class DecoderHook:
    """Calls a watcher before and after every forward of a decoder.

    Args:
        decoder: of the model.
        watcher: an object with ``before(arguments)`` and ``after(arguments)``, where arguments are the forward's, by name. It is
            not kept alive; when it goes, the decoder has no hook any more.
    """

    def __init__(self, decoder: nn.Module, watcher):
        weak = weakref.ref(watcher)
        hooks = _Call(weak, "before"), _Call(weak, "after")
        before = decoder.register_forward_pre_hook(hooks[0], with_kwargs=True)
        self._handles = before, decoder.register_forward_hook(hooks[1], with_kwargs=True)
        weakref.finalize(watcher, self.remove)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Call:
    """A hook that calls a method of its watcher."""

    def __init__(self, watcher: weakref.ref, method: str):
        self.watcher, self.method = watcher, method

    @torch.compiler.disable
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict, *_) -> None:
        watcher = self.watcher()
        if watcher is not None:
            named = inspect.signature(decoder.forward).bind_partial(*args).arguments if args else {}
            getattr(watcher, self.method)({**named, **kwargs})
