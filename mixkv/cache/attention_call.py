"""AttentionCall: around what the attention function does with a layer."""

from __future__ import annotations

import weakref

import torch

from ..hf.attention import check_caller


class AttentionCall:
    """What an attention function does with a layer: checks before, and afterwards the layer is done or the forward is undone.

    Args:
        layer: a `MixKVLayer` whose keys have been handed out.
        module: the attention module that calls.
        kwargs: what it gives its attention function.

    Not a generator: one that an exception leaves open would run its handler when it is collected, in a later forward.
    """

    def __init__(self, layer, module: torch.nn.Module, kwargs: dict):
        self.layer, self.module, self.kwargs = layer, module, kwargs

    def __enter__(self) -> None:
        layer = self.layer
        layer.state.pending_layer = None
        try:
            check_caller(layer.module and layer.module(), self.module, layer.seen, self.kwargs)
            layer.module = weakref.ref(self.module)
        except BaseException:
            self._undo()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None:
            self.layer.state.progress.finish_layer()
        else:
            self._undo()

    def _undo(self) -> None:
        cache = self.layer.state.cache and self.layer.state.cache()
        if cache is not None:
            cache._undo_forward()
