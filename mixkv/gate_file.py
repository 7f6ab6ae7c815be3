"""Gates as files: one linear function a KV head and layer, bound to a model's weights. Load, check and save.

`mixkv.calibrate` makes them; see `mixkv.selection.gate`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checked_file
from .selection.gate import LayerGate

FORMAT = 1
KIND = "gate"
_MAKER = "mixkv.calibrate"
# Values read of every parameter of attention, and how far they may be from those of the model that a gate was fitted to, as a
# share of their size: the same weights in another dtype are as close.
_SAMPLES, _TOLERANCE = 4, 0.005


@dataclass(frozen=True)
class Gate:
    """The gates of a model's compressed layers.

    Attributes:
        layers: one a layer.
        probe: some values of the model's attention weights, by layer and name of the parameter.
        about: further entries of the file's header.
    """

    layers: Sequence[LayerGate]
    probe: Mapping[str, torch.Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)

    def distance(self, probe: Mapping[str, torch.Tensor], layers: int) -> float:
        """How far a model of so many compressed layers, with these weights, is from the one it was fitted to, as a share of them.

        Infinite if the models cannot be the same.
        """
        common = [name for name in self.probe if name in probe and probe[name].shape == self.probe[name].shape]
        if len(self.layers) != layers or (not common and (self.probe or probe)):
            return math.inf
        differ = sum(float((self.probe[name] - probe[name]).abs().sum()) for name in common)
        return differ / max(sum(float(self.probe[name].abs().sum()) for name in common), 1e-30)

    def fits(self, probe: Mapping[str, torch.Tensor], layers: int) -> bool:
        """Whether it was fitted to a model of so many compressed layers and of these weights, in any dtype."""
        return self.distance(probe, layers) <= _TOLERANCE


def probe(modules: Mapping[int, nn.Module]) -> dict[str, torch.Tensor]:
    """Some values of the weights of attention ``modules`` by layer, in float32 on the CPU, as far as they are plain numbers."""
    found = {}
    for index, module in modules.items():
        for name, parameter in sorted(module.named_parameters()):
            plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
            if plain and parameter.numel():
                values = parameter.detach().reshape(-1)
                found[f"{index}.{name}"] = values[:: -(-values.numel() // _SAMPLES)].float().cpu()
    return found


def save(gate: Gate, path: str | os.PathLike) -> None:
    """Writes a gate; a file at ``path`` is replaced once all is written.

    Raises:
        OSError: the file cannot be written.
    """
    from . import __version__

    header = {**gate.about, "format": FORMAT, "kind": KIND, "mixkv": __version__, "layers": len(gate.layers)}
    tensors = {f"probe.{name}": values for name, values in gate.probe.items()}
    for index, layer in enumerate(gate.layers):
        tensors |= {f"{index}.weight": layer.weight, f"{index}.partner": layer.partner.to(torch.int16)}
    checked_file.write(path, header, tensors)


def load(path: str | os.PathLike) -> Gate:
    """The gate in a file that `save` wrote.

    Raises:
        ValueError: the file does not exist, is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"gate file {path} does not exist: make one with {_MAKER}, or leave gate out")
    header, tensors = checked_file.read(path, range(FORMAT, FORMAT + 1), kind=KIND, maker=_MAKER)
    layers = [
        LayerGate(tensors[f"{index}.weight"].float(), tensors[f"{index}.partner"].long()) for index in range(header["layers"])
    ]
    values = {name.removeprefix("probe."): tensor for name, tensor in tensors.items() if name.startswith("probe.")}
    about = {name: value for name, value in header.items() if name not in ("format", "kind", "layers")}
    return Gate(layers, values, about)
