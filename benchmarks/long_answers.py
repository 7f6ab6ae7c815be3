"""Long answers under a decode budget: teacher-forced KL from the full cache, by what decides which entries stay.

    python benchmarks/long_answers.py [--tokens 4096] [--prompt 512] [--bounds 128,256] [--seeds 1,3] [--out FILE.jsonl]

Texts are from Python's manual. The first ``--prompt`` tokens are the prompt, the others are fed as if they had been generated; entries are
evicted after every 64 tokens, down to the bound. ``window`` is what the library does by default: attention of the last queries with the
default method and score, of each row by itself. ``pooled`` pools it over neighbouring rows, as decode-time SnapKV does. ``snapkv`` and
``pooled snapkv`` are the same with equal parts and attention alone, ``streaming`` the first four tokens and the latest, ``r-kv``
attention of the last eight queries against redundancy (z = 0.1 a - 0.9 r, arXiv 2505.24133). All see the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
import transformers
from torch.nn.functional import max_pool1d, normalize

import mixkv
from mixkv.cache.compress import Compressor
from mixkv.cache.layer import MixKVLayer
from mixkv.evaluation import paired, smollm2, tasks
from mixkv.hf.versions import cache_argument

BLOCK, FIRST, RKV_QUERIES, RKV_SHARE = 64, 4, 8, 0.1


def streaming(context) -> torch.Tensor:
    """The later the better, and the first tokens before all others."""
    valid = context.valid_candidates.expand(*context.key.shape[:2], -1)
    place = valid.cumsum(dim=-1)
    return place.float().masked_fill(valid & (place <= FIRST), torch.inf)


def r_kv(context) -> torch.Tensor:
    """R-KV's score: max-pooled attention of the last queries, and the softmax of a key's mean cosine with the others."""
    count, heads = context.num_candidates, context.key.shape[1]
    query = context.query[:, :, -RKV_QUERIES:].unflatten(1, (heads, -1))
    logits = query @ context.key[:, :, None, :count].mT * context.key.shape[-1] ** -0.5
    attention = (
        logits.masked_fill(~context.valid_candidates.unsqueeze(2).unsqueeze(2), -torch.inf).softmax(dim=-1).mean(dim=(2, 3))
    )
    attention = max_pool1d(attention, 7, stride=1, padding=3)
    keys = normalize(context.key[:, :, :count].float(), dim=-1) * context.valid_candidates.unsqueeze(-1)
    cosine = keys @ keys.mT
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    redundancy = cosine.mean(dim=-1).masked_fill(~context.valid_candidates, -torch.inf).softmax(dim=-1)
    return RKV_SHARE * attention - (1 - RKV_SHARE) * redundancy


mixkv.register_score("streaming", streaming)
mixkv.register_score("r-kv", r_kv)


class Pooled(mixkv.MixKVCache):
    """A cache that pools scores over the rows held, as it does over a prompt's tokens."""

    class layer_class(MixKVLayer):
        class compressor_class(Compressor):
            @property
            def decode_config(self):
                return self.config


VARIANTS: dict[str, dict] = {
    "pooled": {},
    "window": {},
    "snapkv": {"method": "snapkv", "score": "attn"},
    "pooled snapkv": {"method": "snapkv", "score": "attn"},
    "streaming": {"method": "snapkv", "score": "streaming"},
    "r-kv": {"method": "snapkv", "score": "r-kv", "window": RKV_QUERIES},
}
POOLED = ("pooled", "pooled snapkv")


def text(tokenizer, seed: int, tokens: int) -> torch.Tensor:
    """Token ids [1, tokens]."""
    passage = tasks._passage(random.Random(f"long {seed}"), seed, 8 * tokens)
    return torch.tensor([tokenizer(passage)["input_ids"][:tokens]])


@torch.no_grad()
def divergence(model, ids: torch.Tensor, prompt: int, bound: int, variants: dict[str, dict]) -> dict[str, float]:
    """Nats a token for every variant, over the tokens after the prompt."""
    full = transformers.DynamicCache(config=model.config)
    caches = {
        name: (Pooled if name in POOLED else mixkv.MixKVCache)(
            model, budget=bound, decode_budget=bound, decode_slack=BLOCK - 1, **options
        )
        for name, options in variants.items()
    }
    for cache in (full, *caches.values()):
        model(ids[:, :prompt], **cache_argument(cache), logits_to_keep=1)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in caches}
    for block in ids[:, prompt:].split(BLOCK, dim=1):
        expected = model(block, **cache_argument(full)).logits[0].log_softmax(dim=-1)
        for name, cache in caches.items():
            logits = model(block, **cache_argument(cache)).logits[0].log_softmax(dim=-1)
            found[name].append((expected.exp() * (expected - logits)).sum(dim=-1))
    mixkv.unpatch(model)
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--bounds", default="128,256")
    parser.add_argument("--seeds", default="1,3")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path, help="appends a line for every text and bound")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = smollm2.load()
    variants = {name: VARIANTS[name] for name in args.variants.split(",")}
    for bound in map(int, args.bounds.split(",")):
        lines = []
        for seed in map(int, args.seeds.split(",")):
            ids = text(tokenizer, seed, args.tokens)
            line = {"bound": bound, "seed": seed, "tokens": args.tokens, "prompt": args.prompt}
            lines.append(line | {"kl": divergence(model.eval(), ids, args.prompt, bound, variants)})
            print(json.dumps(lines[-1]), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
        reference, *others = variants
        print(f"bound {bound}: {reference} {statistics.fmean(line['kl'][reference] for line in lines):.4f} nats a token")
        for name in others:
            pairs = [[line["kl"][one] for line in lines] for one in (name, reference)]
            change, low, high = paired.relative_change(*pairs)
            print(f"  {name}: {change:+.1%} ({low:+.1%} to {high:+.1%})")


if __name__ == "__main__":
    main()
