"""Which tokens of a sequence belong to images, and which of those are kept."""

from __future__ import annotations

import torch

from . import call_stack

_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def image_token_ids(config) -> set[int]:
    """The placeholder ids of images and videos in a model's ``config``; none where images enter by cross-attention."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        return set()
    return {found for name in _NAMES if isinstance(found := getattr(config, name, None), int)}


def picture_token_ids(config) -> set[int]:
    """The placeholder ids of images alone."""
    return image_token_ids(config) - {getattr(config, name, None) for name in ("video_token_id", "video_token_index")}


class ImageTokens:
    """Learns from the token ids, forward by forward, which tokens of the sequence belong to images (or videos).

    ``mask``: bool [B, tokens read so far], True for images; tokens beyond it are text; None: not known.
    """

    def __init__(self):
        self.mask: torch.Tensor | None = None
        self._given: torch.Tensor | None = None
        self._prompt_has_images = False

    def give(self, mask: torch.Tensor) -> None:
        """Uses ``mask`` [B, tokens of the next prompt or turn] in place of what the token ids say.

        Raises:
            ValueError: it has not two dimensions.
        """
        if mask.ndim != 2:
            raise ValueError(f"the image mask has shape {list(mask.shape)}: it must be [B, N], nonzero for image tokens")
        self._given = mask.bool()

    def read(self, start: int, tokens: int, like: torch.Tensor) -> None:
        """Positions ``start`` to ``start + tokens`` are about to be read; ``like`` [B, ...] is a tensor on their device.

        A single token after the prompt is a generated one, which is text.

        Raises:
            ValueError: the mask that was given does not fit them.
        """
        batch = like.shape[0]
        past = torch.zeros(batch, 0, dtype=torch.bool, device=like.device) if start == 0 else self.mask
        if past is not None and past.shape[1] > start:
            past = past[:, :start]  # tokens were taken back
        if tokens == 1 and start > 0:
            self.mask = past
            return
        given, self._given = self._given, None
        if given is not None:
            new = _fitting(given, batch, tokens)
        else:
            new = None if past is None else _from_ids(batch, tokens)
        if past is None or new is None:
            self.mask = None
        else:
            past = torch.nn.functional.pad(past, (0, start - past.shape[1]))
            self.mask = torch.cat([past, new.to(like.device)], dim=1)
        if start == 0:
            self._prompt_has_images = self.mask is not None and bool(self.mask.any())

    def take_rows(self, rows: list[int]) -> None:
        if self.mask is not None:
            self.mask = self.mask[rows]

    @property
    def of_prompt(self) -> torch.Tensor | None:
        """The mask [B, N] of the prompt that is being read, None if it has no image or that is not known."""
        return self.mask if self._prompt_has_images else None

    def count(self, kept: list[list[torch.Tensor]]) -> torch.Tensor | None:
        """Image tokens among the positions ``kept`` [B][Hkv]: int64 [B, Hkv] on the CPU; None if there is no image or that is not known."""
        if self.mask is None or not kept or not self.mask.any():
            return None
        mask = self.mask.cpu()
        return torch.tensor(
            [
                [int(row[positions[positions < mask.shape[1]].cpu().long()].sum()) for positions in heads]
                for row, heads in zip(mask, kept, strict=True)
            ]
        )


# The name in caches that mixkv 0.1.0 pickled.
ImageColumns = ImageTokens


def _fitting(given: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """``given`` as a mask [batch, tokens]: a row for each prompt serves all of its beams or samples."""
    if given.shape[1] != tokens or batch % given.shape[0]:
        raise ValueError(
            f"the image mask has shape {list(given.shape)}, but a batch of {batch} rows of {tokens} tokens is read: give a mask "
            f"[{batch}, {tokens}] (one row for all beams of a prompt will do)"
        )
    return given.repeat_interleave(batch // given.shape[0], dim=0)


def _from_ids(batch: int, tokens: int) -> torch.Tensor | None:
    """Which of the token ids [batch, tokens] belong to images: the ids that the calling model was given, None if they cannot be found."""
    for ids, config in call_stack.calling_ids(batch, tokens):
        placeholders = image_token_ids(config)
        if placeholders:
            return torch.isin(ids, torch.tensor(sorted(placeholders), device=ids.device))
    return None
