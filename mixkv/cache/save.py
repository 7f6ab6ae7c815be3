"""A compressed cache as a file and back: what is stored, and the checks that it fits the model it is loaded for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import checked_file, registry, tensor_parallel
from ..config import MixKVConfig
from ..hf import binding, stock_layers, versions
from ..ops.arguments import LogitOptions
from .layer import MixKVLayer
from .parts import PARTS

FORMAT = 2
_FIELDS = {"mixkv", "model", "dtype", "batch", "recording", "moved", "config", "layers"}
_NUMBERS = {"heads", "key_size", "value_size", "seen", "tail", "bound", "scaling", "softcap", "share"}
_CHUNK_NUMBERS = ("chunk_rows", "chunk_columns", "chunk_slots")
_MOVED = "rope_deltas"
_IMAGES = "image_mask"
# Values read of each parameter to distinguish a model's weights from another's.
_SAMPLES = 64


@dataclass(frozen=True)
class Saved:
    """A file's contents, whole and of a known format.

    ``header``: format, mixkv (version), model (class name), dtype, batch, recording, config, moved (whether the model knew how
        far images move positions; None: the model had gone), about (what the caller of `save` gave, if anything), and under ``layers`` one entry a layer of the model: kind, and
        what that kind of layer needs beside its tensors.
    ``tensors``: by layer index and name, ``"3.key"``; of a compressed layer key [rows, D], value [rows, Dv], position [rows],
        lengths [B, Hkv], redundancy [B, Hkv], of rows in int8 key_scale and value_scale [rows], and query_tail, sinks, modal_redundancy [B, Hkv, 2], kept_share [B] where there are any; of
        ``hybridkv`` sparsity and dynamic [B, Hkv], and where there are chunks chunk_key [rows, D], chunk_value [rows, Dv] and
        chunk_rows, chunk_columns (first positions), chunk_slots [B, Hkv]; ``rope_deltas`` where ``moved``; ``image_mask`` bool
        [B, tokens] where it is known which tokens are image tokens.
    """

    path: str
    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    config: MixKVConfig


def save(cache, path: str | os.PathLike, about: Mapping[str, Any] = MappingProxyType({})) -> None:
    """See `MixKVCache.save`."""
    from .. import __version__

    ours = _read_layers(cache)
    if any(layer.remote is not None or tensor_parallel.is_spread(layer.module and layer.module()) for layer in ours):
        raise ValueError(
            "this cache belongs to a tensor-parallel model and holds only this process's heads: it cannot be saved. Read the "
            "prompt with the model loaded in one process, without tp_plan"
        )
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        try:
            held, numbers = _state(layer) if isinstance(layer, MixKVLayer) else stock_layers.state(layer)
        except ValueError as error:
            raise ValueError(f"layer {index} of {cache._model_name}: {error}") from error
        tensors |= {f"{index}.{name}": tensor for name, tensor in held.items()}
        layers.append(numbers)
    model = cache._model and cache._model()
    deltas = [keeper.rope_deltas for keeper in versions.position_keepers(model)] if model is not None else []
    moved = any(part is not None for part in deltas)
    if moved:
        tensors[_MOVED] = deltas[0]
    if cache._state.images.mask is not None:
        tensors[_IMAGES] = cache._state.images.mask[:, : ours[0].seen]
    header = {
        "format": FORMAT,
        "mixkv": __version__,
        "model": cache._model_name,
        "dtype": _dtype_name(ours[0].dtype),
        "batch": ours[0].batch,
        "recording": cache._state.rollback_enabled,
        "moved": None if model is None else moved,
        "config": cache.config.to_dict(),
        "layers": layers,
        **({"about": dict(about)} if about else {}),
    }
    checked_file.write(path, header, tensors)


def read(path: str | os.PathLike) -> Saved:
    """A file that `save` wrote, checked as far as it can be without a model.

    Raises:
        ValueError: damaged, foreign, of another format, or with a config that this version does not know.
        OSError: it cannot be read.
    """
    header, tensors = checked_file.read(path, range(FORMAT, FORMAT + 1))
    if not _FIELDS <= header.keys():
        raise ValueError(f"{path} is damaged (its header lacks {sorted(_FIELDS - header.keys())}): save the cache again")
    try:
        config = MixKVConfig.from_dict(header["config"])
    except ValueError as error:
        raise ValueError(
            f"{path} was saved by mixkv {header['mixkv']} with a config that this mixkv does not take ({error}). Register what "
            f"it names first, or load it with that version"
        ) from error
    return Saved(str(path), header, tensors, config)


def restore(cache, saved: Saved, model: PreTrainedModel) -> None:
    """Fills the unused ``cache`` of ``model`` with what was saved.

    Raises:
        ValueError: it was saved from another model; the message names what differs.
    """
    modules = binding.attention_modules(model)
    _check_model(cache, saved, model, modules)
    for index, (layer, numbers) in enumerate(zip(cache.layers, saved.header["layers"])):
        prefix = f"{index}."
        held = {name.removeprefix(prefix): part for name, part in saved.tensors.items() if name.startswith(prefix)}
        device = next(modules[index].parameters()).device if index in modules else model.device
        if device.type == "meta":
            raise ValueError(
                f"the weights of layer {index} are offloaded, so that its cache has no place: load the model whole"
            )
        if isinstance(layer, MixKVLayer):
            _check_rows(saved, index, held, numbers)
            _fill(layer, held, numbers, device, modules[index], cache.config)
        else:
            stock_layers.restore(layer, held, numbers, device)
    for keeper in versions.position_keepers(model):
        keeper.rope_deltas = saved.tensors[_MOVED].to(model.device, copy=True) if saved.header["moved"] else None
    if _IMAGES in saved.tensors:
        mask = _checked_mask(saved)
        cache._state.images.mask = mask.to(
            next(layer.device for layer in cache.layers if isinstance(layer, MixKVLayer)), copy=True
        )
    cache._batch = saved.header["batch"]
    if saved.header["recording"]:
        cache.activate_past_recording()


def _read_layers(cache) -> list[MixKVLayer]:
    """The compressed layers, all of which have read a whole prompt.

    Raises:
        ValueError: they have not.
    """
    ours = [layer for layer in cache.layers if isinstance(layer, MixKVLayer)]
    if not any(layer.seen for layer in ours):
        raise ValueError("this cache is empty: let a model read a prompt with it, then save it")
    if any(layer.rows is None for layer in ours):
        raise ValueError(
            f"this cache has read {max(layer.seen for layer in ours)} tokens of a prompt, not all of it: save it once the prompt has "
            f"been read to its end"
        )
    if cache._state.reads_turn(ours[0].seen):
        raise ValueError(
            f"this cache has read {ours[0].seen} tokens, and its last turn ends after {cache._state.turn.end}: save it once the turn "
            f"has been read to its end"
        )
    if len({layer.seen for layer in ours}) > 1:
        raise ValueError("a forward with this cache was interrupted between two layers: make a new cache, and save that")
    return ours


def _state(layer: MixKVLayer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    heads, key_size, value_size = layer.shape
    module = layer.module and layer.module()
    tensors = {} if layer.logits.sinks is None else {"sinks": layer.logits.sinks}
    numbers = {
        "kind": MixKVLayer.__name__,
        "heads": heads,
        "key_size": key_size,
        "value_size": value_size,
        "dtype": _dtype_name(layer.dtype),
        "seen": layer.seen,
        "scaling": layer.logits.scaling,
        "softcap": layer.logits.softcap,
        "weights": None if module is None else _fingerprint(module),
    }
    for part in layer.parts:
        part_tensors, part_numbers = part.state()
        tensors |= part_tensors
        numbers |= part_numbers
    return tensors, numbers


def _fill(
    layer: MixKVLayer,
    held: dict[str, torch.Tensor],
    numbers: dict[str, Any],
    device: torch.device,
    module: nn.Module,
    config: MixKVConfig,
) -> None:
    copies = {name: tensor.to(device, copy=True) for name, tensor in held.items()}
    dtype = getattr(torch, numbers["dtype"]) if "key_scale" in copies else copies["key"].dtype
    layer.restore(
        {name: restore(copies, numbers, config, dtype) for name, restore in PARTS.items()},
        seen=numbers["seen"],
        shape=(numbers["heads"], numbers["key_size"], numbers["value_size"]),
        dtype=dtype,
        device=copies["key"].device,
        logits=LogitOptions(numbers["scaling"], numbers["softcap"], copies.get("sinks")),
        module=module,
    )


def _check_model(cache, saved: Saved, model: PreTrainedModel, modules: dict[int, nn.Module]) -> None:
    header, layers = saved.header, saved.header["layers"]
    remedy = "load the model it was saved from"
    if any(map(tensor_parallel.is_spread, modules.values())):
        raise ValueError(
            f"{saved.path} holds all heads, and this model is tensor-parallel, with some of them in each process: load the model "
            f"in one process, without tp_plan"
        )
    if header["model"] != cache._model_name:
        raise ValueError(f"{saved.path} was saved from a {header['model']}, and this model is a {cache._model_name}: {remedy}")
    if len(layers) != len(cache.layers):
        raise ValueError(f"{saved.path} holds {len(layers)} layers, and this model has {len(cache.layers)}: {remedy}")
    for index, (layer, numbers) in enumerate(zip(cache.layers, layers)):
        for name, ours in _expected(layer, modules.get(index)).items():
            if numbers.get(name) != ours:
                raise ValueError(
                    f"layer {index} in {saved.path} has {name}={numbers.get(name)!r}, and this model's has {ours!r}: {remedy}"
                )
    if header["moved"] is None and versions.position_keepers(model):
        raise ValueError(
            f"{saved.path} does not contain how far images move the positions after them, which a {header['model']} keeps itself: it was "
            f"saved from a copy, or after its model had gone. Save the first cache"
        )
    others = [index for index, numbers in enumerate(layers) if numbers.get("weights") not in _weights(modules.get(index))]
    if not others:
        return
    if header["dtype"] != _dtype_name(model.dtype):
        raise ValueError(
            f"{saved.path} holds {header['dtype']}, and this model computes in {_dtype_name(model.dtype)}: load the model with "
            f"dtype=torch.{header['dtype']}"
        )
    raise ValueError(
        f"{saved.path} was saved from a {header['model']} with other weights (layers {others[:4]} differ): {remedy}"
    )


def _expected(layer, module: nn.Module | None) -> dict[str, Any]:
    """What the header must contain for a layer of this model, as far as its module has it."""
    if not isinstance(layer, MixKVLayer):
        window = getattr(layer, "sliding_window", None)
        return {"kind": type(layer).__name__} | ({} if window is None else {"sliding_window": window})
    expected: dict[str, Any] = {"kind": MixKVLayer.__name__}
    query_heads = getattr(module.config, "num_attention_heads", None)
    if query_heads is not None:
        expected["heads"] = query_heads // module.num_key_value_groups
    if getattr(module, "head_dim", None) is not None:
        expected["key_size"] = module.head_dim
    return expected


def _check_rows(saved: Saved, index: int, held: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """A store reads memory by these numbers, so none is taken on trust."""
    if not _NUMBERS <= numbers.keys():
        missing = sorted(_NUMBERS - numbers.keys())
        raise ValueError(f"{saved.path} is damaged (layer {index} lacks {missing}): save the cache again")
    batch, heads = saved.header["batch"], numbers["heads"]
    lengths = held.get("lengths")
    rows = int(lengths.sum()) if lengths is not None else -1
    shapes = {
        "key": [rows, numbers["key_size"]],
        "value": [rows, numbers["value_size"]],
        "position": [rows],
        "lengths": [batch, heads],
        "redundancy": [batch, heads],
    }
    shapes |= {name: [batch, heads] for name in ("sparsity", "dynamic") if name in held}
    if "chunk_key" in held:
        chunked = int(held["chunk_rows"].sum()) if "chunk_rows" in held else -1
        shapes |= {"chunk_key": [chunked, numbers["key_size"]], "chunk_value": [chunked, numbers["value_size"]]}
        shapes |= dict.fromkeys(_CHUNK_NUMBERS, [batch, heads])
    chosen = registry.row_format(saved.config.rows)
    if chosen.codes:
        shapes |= {"key_scale": [rows], "value_scale": [rows]}
    if chosen.packs:
        shapes |= _packed_shapes(held, numbers, batch)
    if "modal_redundancy" in held:
        shapes["modal_redundancy"] = [batch, heads, 2]
    if "kept_share" in held:
        shapes["kept_share"] = [batch]
    found = {name: list(held[name].shape) if name in held else None for name in shapes}
    if found != shapes or lengths.dtype != torch.int32 or held["position"].dtype != torch.int32 or (lengths < 0).any():
        raise ValueError(f"{saved.path} is damaged (layer {index} has {found} instead of {shapes}): save the cache again")
    longest = max(int(lengths.max()), numbers["bound"] or 0)
    if longest > numbers["seen"] or not 0 <= numbers["tail"] <= int(lengths.min()):
        raise ValueError(f"{saved.path} is damaged (layer {index} has lengths {lengths.tolist()}): save the cache again")
    if "chunk_key" not in held:
        return
    rows, first, slots = (held[name] for name in _CHUNK_NUMBERS)
    chunk = saved.config.hybrid_chunk
    most = (rows + chunk - 1) // chunk
    wrong = (rows < 0) | (first < 0) | (rows + first > numbers["seen"]) | (slots < 0) | (slots > most)
    if wrong.any() or not slots.any() or any(part.dtype != torch.int32 for part in (rows, first, slots)):
        raise ValueError(f"{saved.path} is damaged (layer {index} has chunk_rows {rows.tolist()}): save the cache again")


def _packed_shapes(held: dict[str, torch.Tensor], numbers: dict[str, Any], batch: int) -> dict[str, list[int]]:
    """Of the tensors of rows in 4 bits."""
    lengths = held.get("packed_lengths")
    whole = lengths is not None and lengths.dtype == torch.int32 and not (lengths < 0).any()
    rows = int(lengths.sum()) if whole else -1
    vectors = {f"packed_{name}": [rows] for name in ("position", "key_scale", "value_scale")}
    codes = {f"packed_{name}": [rows, numbers[f"{name}_size"] // 2] for name in ("key", "value")}
    return {"packed_lengths": [batch, numbers["heads"]], **vectors, **codes}


def _checked_mask(saved: Saved) -> torch.Tensor:
    mask = saved.tensors[_IMAGES]
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] != saved.header["batch"]:
        raise ValueError(f"{saved.path} is damaged (its image mask is {mask.dtype} {list(mask.shape)}): save the cache again")
    return mask


def _weights(module: nn.Module | None) -> tuple[str | None, ...]:
    """The fingerprints that fit a layer; a saved layer has none where its module had gone."""
    return (None,) if module is None else (None, _fingerprint(module))


def _fingerprint(module: nn.Module) -> str:
    """A digest of a few values of every plain parameter: the same for the same weights in the same dtype, anywhere."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel():
            values = parameter.detach().reshape(-1)
            values = values[:: max(1, values.numel() // _SAMPLES)].cpu()
            digest.update(f"{name} {values.dtype}".encode())
            digest.update(values.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
