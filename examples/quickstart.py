"""A long text and a question, answered with the full cache and twice with a compressed cache.

pip install 'mixkv[demo]'
python examples/quickstart.py
"""

import mixkv
from mixkv.evaluation import loading, prompts

loaded = loading.load()  # SmolLM2-135M-Instruct; any causal language model of transformers works
model, tokenizer = loaded.model, loaded.tokenizer
ids = prompts.encode(tokenizer, prompts.demo()).to(model.device)
options = {"attention_mask": ids.new_ones(ids.shape), "max_new_tokens": 24, "do_sample": False}


def answer(tokens):
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


print("full cache:", answer(model.generate(ids, **options)))

# One line: generate() now keeps a compressed cache.
mixkv.patch(model, budget=128)
print("patched:   ", answer(model.generate(ids, **options)))
mixkv.unpatch(model)

# Or a cache for a single call, which can be inspected afterwards.
cache = mixkv.MixKVCache(model, method="adakv", score="mix", budget=128)
print("one cache: ", answer(model.generate(ids, cache=cache, **options)))
held = cache.stats()
print(f"held {held['bytes'] / 2**20:.1f} MiB instead of {held['bytes_full'] / 2**20:.1f} MiB ({held['ratio']:.1%})")
print("positions that head 0 of layer 0 keeps:", cache.kept(0)[0][0].tolist()[:12], "...")
