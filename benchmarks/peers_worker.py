"""The worker process of `peers.py` for one library: has a model and its caches, and answers requests, one per line.

    python peers_worker.py mixkv|kvpress FOLDER ROWS WINDOW THREADS

Runs in the environment of the library it measures. Requests and answers are JSON, one a line:
    {"read": cache, "ids": [...]}      reads a prompt into a new cache: seconds, bytes, rows_per_head (attended), layer_rows
    {"answer": count}                  the full cache's greedy answer: tokens; uses that cache up
    {"step": token, "first": index}    feeds a token to every cache, that one first: seconds and kl to the full cache, by name
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

FULL = "full"


class Mixkv:
    """Caches ``full`` and ``METHOD SCORE`` of this repository's library."""

    def __init__(self, model, rows: int, window: int):
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import mixkv
        from mixkv.evaluation import measure

        self.model, self.measure, self.version = model, measure, mixkv.__version__
        self.configs = {FULL: None} | {
            f"{method} {score}": mixkv.MixKVConfig(method=method, score=score, budget=rows, window=window)
            for method in ("snapkv", "pyramidkv", "adakv")
            for score in ("attn", "mix")
        }
        self.names, self.caches = list(self.configs), {}

    def read(self, name: str, ids: torch.Tensor) -> dict[str, Any]:
        self.caches.pop(name, None)
        read = self.measure.read_prompt(self.model, ids, self.configs[name])
        self.caches[name] = read.cache
        held = self.measure.held(read.cache)
        if name == FULL:
            layers = [ids.shape[1]] * len(read.cache.layers)
        else:
            layers = [layer.double().mean().item() for layer in read.cache.stats()["lengths"] if layer is not None]
        answer = {"seconds": read.seconds, "bytes": held.bytes, "rows_per_head": held.rows_per_head, "layer_rows": layers}
        return answer | {"first": int(read.logits.argmax())}

    def step(self, name: str, token: int) -> tuple[torch.Tensor, float]:
        return self.measure.step(self.model, self.caches[name], torch.tensor([token]))


class Kvpress:
    """Caches ``full`` and ``METHOD attn`` of kvpress."""

    def __init__(self, model, rows: int, window: int):
        from importlib.metadata import version

        from kvpress import AdaKVPress, PyramidKVPress, SnapKVPress

        self.model, self.rows, self.version = model, rows, version("kvpress")
        options = {"window_size": window, "kernel_size": 5}
        self.presses = {
            FULL: None,
            "snapkv attn": SnapKVPress(**options),
            "pyramidkv attn": PyramidKVPress(**options),
            "adakv attn": AdaKVPress(SnapKVPress(**options)),
        }
        self.names, self.caches = list(self.presses), {}
        self.attention = [layer.self_attn for layer in model.model.layers]

    def read(self, name: str, ids: torch.Tensor) -> dict[str, Any]:
        self.caches.pop(name, None)
        length, press = ids.shape[1], self.presses[name]
        cache = DynamicCache(config=self.model.config)
        self._mask([None] * len(self.attention))
        start = perf_counter()
        if press is None:
            logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        else:
            # kvpress rounds down, here off by one without the quarter.
            press.compression_ratio = 1 - (self.rows + 0.25) / length
            with press(self.model):
                logits = self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
        seconds = perf_counter() - start
        # kvpress stores the positions that AdaKV masks on the model's modules; here every cache has its own.
        masked = [getattr(module, "masked_key_indices", None) for module in self.attention]
        self.caches[name] = [cache, masked, length]
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        tensors += [tensor for indices in masked if indices for tensor in indices]
        heads = cache.layers[0].keys.shape[1]
        layers = [
            layer.keys.shape[2] - (indices[0].numel() / heads if indices else 0) for layer, indices in zip(cache.layers, masked)
        ]
        return {
            "seconds": seconds,
            "bytes": sum(tensor.untyped_storage().nbytes() for tensor in tensors),
            "rows_per_head": sum(layers) / len(layers),
            "layer_rows": layers,
            "first": int(logits[0, -1].argmax()),
        }

    def step(self, name: str, token: int) -> tuple[torch.Tensor, float]:
        cache, masked, seen = self.caches[name]
        self._mask(masked)
        self.caches[name][2] += 1
        ids, position = torch.tensor([[token]]), torch.tensor([[seen]])
        start = perf_counter()
        logits = self.model(input_ids=ids, past_key_values=cache, position_ids=position).logits
        return logits[:, -1], perf_counter() - start

    def _mask(self, masked: list) -> None:
        for module, indices in zip(self.attention, masked):
            module.masked_key_indices = indices


def answer(side, first: int, count: int) -> list[int]:
    """Greedy tokens from the full cache, up to the end-of-text token."""
    end = side.model.generation_config.eos_token_id
    tokens = [first]
    while len(tokens) < count and tokens[-1] not in (end if isinstance(end, list) else [end]):
        tokens.append(int(side.step(FULL, tokens[-1])[0].argmax()))
    return tokens


def step_all(side, token: int, first: int) -> dict[str, dict[str, float]]:
    """A decode step of every cache, starting with another cache each time."""
    first %= len(side.names)
    outcome = {name: side.step(name, token) for name in side.names[first:] + side.names[:first]}
    full = outcome[FULL][0].float().log_softmax(-1)
    divergences = {
        name: (full.exp() * (full - logits.float().log_softmax(-1))).sum().item() for name, (logits, _) in outcome.items()
    }
    return {"seconds": {name: outcome[name][1] for name in side.names}, "kl": divergences}


@torch.no_grad()
def main() -> None:
    library, folder, rows, window, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    # Output of the libraries goes to standard error: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    side = {"mixkv": Mixkv, "kvpress": Kvpress}[library](model, rows, window)
    for name in side.names:
        side.read(name, torch.ones(1, 2 * rows, dtype=torch.long))
    step_all(side, 1, 0)
    side.caches.clear()

    def send(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    versions = {library: side.version, "torch": torch.__version__, "transformers": transformers.__version__}
    send({"names": side.names, "versions": versions})
    first = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "read" in request:
            result = side.read(request["read"], torch.tensor([request["ids"]]))
            if request["read"] == FULL:
                first = result["first"]
            send(result)
        elif "answer" in request:
            send({"tokens": answer(side, first, request["answer"])})
        else:
            send(step_all(side, request["step"], request["first"]))


if __name__ == "__main__":
    main()
