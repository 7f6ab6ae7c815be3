"""One safetensors file with a JSON header and a checksum: written at once or not at all, and distinguished from any other file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_ENTRY = "mixkv"


def write(path: str | os.PathLike, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Writes ``header`` (JSON values) and ``tensors`` by name, over a file at ``path`` once all is written.

    Raises:
        OSError: the folder does not exist or cannot be written, or ``path`` is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of {path} does not exist: create it first")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"header": header, "sha256": checksum(header, tensors)})
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder) / path.name
        save_file(tensors, partial, metadata={_ENTRY: text})
        os.replace(partial, path)


def read(
    path: str | os.PathLike, formats: range, *, kind: str = "cache", maker: str = "MixKVCache.save"
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write` wrote: the header, and the tensors on the CPU, not to be written to.

    Args:
        path: the file.
        formats: versions of the header that the caller understands; a header names its own under ``format``.
        kind: what the file should hold; a header names its own under ``kind``, and none is a cache's.
        maker: what writes such files, for messages.

    Raises:
        ValueError: the file is damaged, was not written by `write`, holds something else, or is of another format.
        OSError: it cannot be read.
    """
    again = f"save the {kind} again with {maker}"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if _ENTRY not in metadata:
                raise ValueError(f"{path} is a safetensors file, but no {kind} that {maker} wrote: give the path of one")
            header, expected = _parse(path, metadata[_ENTRY], again)
            if (held := header.get("kind", "cache")) != kind:
                raise ValueError(f"{path} holds a {held}, not a {kind}: give the path of one that {maker} wrote")
            if header.get("format") not in formats:
                raise ValueError(
                    f"{path} has format {header.get('format')!r} (saved by mixkv {header.get('mixkv', '?')}), and this mixkv reads "
                    f"format {formats[-1]}: save it again with this version, or install the one that saved it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no {kind} that {maker} wrote ({error}): {again}") from error
    if checksum(header, tensors) != expected:
        raise ValueError(f"{path} is damaged (its checksum does not fit its contents): {again}")
    return header, tensors


def _parse(path: str | os.PathLike, text: str, again: str) -> tuple[dict[str, Any], str]:
    """The header and the checksum that was written with it."""
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged (its header is not JSON: {error}): {again}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("header"), dict):
        raise ValueError(f"{path} is damaged (its entry {_ENTRY!r} holds no header): {again}")
    return entry["header"], entry.get("sha256")


def checksum(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over a header and the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
