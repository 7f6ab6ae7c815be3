"""Tensor parallelism: two processes, with half of the KV heads each, keep and generate what one process does."""

import os
import socket
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing
import transformers
from support import zoo
from torch import nn

import mixkv
from mixkv import MixKVConfig, registry, tensor_parallel
from mixkv.cache.layer import MixKVLayer
from mixkv.cache.state import Shared
from mixkv.ops.arguments import LogitOptions

RANKS, HEADS = 2, 4
# phi3 keeps all heads in every process, gemma3 has norms behind its output projection.
MODELS = ["llama", "qwen2", "gemma3", "phi3"]
PROFILE = [[1 + (7 * layer + 3 * head) % 5 for head in range(2 * HEADS)] for layer in range(3)]
TABLE = [[((5 * layer + head) % 4) / 4 for head in range(HEADS)] for layer in range(3)]
BASE = dict(budget=14, window=6)
CASES = {
    "llama-default": ("llama", BASE, {}),
    "llama-snapkv": ("llama", BASE | dict(method="snapkv", score="attn"), {}),
    "llama-pyramidkv": ("llama", BASE | dict(method="pyramidkv", redundancy=TABLE), {}),
    "llama-adakv": ("llama", BASE | dict(method="adakv", score="mix", redundancy=TABLE), {}),
    "llama-sparsemm": ("llama", BASE | dict(method="sparsemm", profile=PROFILE), {}),
    "llama-beams": ("llama", BASE | dict(method="adakv", decode_budget=18, decode_slack=3), dict(num_beams=3)),
    "llama-bounded": ("llama", BASE | dict(decode_budget=16, decode_slack=3), {}),
    "llama-lookup": ("llama", BASE | dict(decode_budget=18, decode_slack=3), dict(prompt_lookup_num_tokens=3)),
    "llama-int8": ("llama", BASE | dict(rows="int8"), {}),
    "llama-int4": ("llama", BASE | dict(rows="int4", decode_budget=18, decode_slack=3), {}),
    "llama-chunks": ("llama", BASE, dict(prefill_chunk_size=16)),
    "llama-turns": ("llama", BASE | dict(method="adakv", turns="each"), {}),
    "llama-all": ("llama", BASE | dict(method="adakv", turns="all"), {}),
    "llama-default-turns": ("llama", BASE | dict(turns="each"), {}),
    "llama-default-all": ("llama", BASE | dict(turns="all", decode_budget=20, decode_slack=3), {}),
    "qwen2-default": ("qwen2", BASE, {}),
    "qwen2-adakv": ("qwen2", BASE | dict(method="adakv", score="output"), {}),
    "gemma3-default": ("gemma3", BASE, {}),
    "phi3-default": ("phi3", BASE, {}),
}


def prompts(name, options):
    """A left-padded batch, where the way of generating takes one."""
    return (
        zoo.inputs(name, 44)
        if options.keys() & {"prompt_lookup_num_tokens", "prefill_chunk_size"}
        else zoo.ragged(name, [44, 31])[0]
    )


def generated(model, name, config, options):
    cache = mixkv.MixKVCache(model, **config)
    first = prompts(name, options)
    tokens = model.generate(**first, past_key_values=cache, max_new_tokens=12, do_sample=False, **options)
    if config.get("turns"):
        tokens = torch.cat([tokens, first["input_ids"][:, -20:]], dim=1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, 32), value=1)
        second = {"input_ids": tokens, "attention_mask": mask}
        tokens = model.generate(**second, past_key_values=cache, max_new_tokens=12, do_sample=False)
    stats = cache.stats()
    return dict(
        tokens=tokens,
        kept=[cache.kept(layer) for layer in range(len(cache.layers))],
        redundancy=stats["redundancy"],
        output_norm=stats["output_norm"],
        share=[getattr(layer, "share", None) for layer in cache.layers],
        compressed=sum(isinstance(layer, MixKVLayer) for layer in cache.layers),
    )


def load(folder, name, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", attn_implementation="sdpa", **options).eval()


def counting(calls):
    """Counts the library's collectives in ``calls[0]``."""
    real = tensor_parallel.HeadShard._all_gather

    def count(part, mine):
        calls[0] += 1
        return real(part, mine)

    tensor_parallel.HeadShard._all_gather = count


def work(rank, folder, port):
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    # transformers would wait for hours for a process that has failed.
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
    calls, found = [0], {}
    counting(calls)
    models = {name: load(folder, name, tp_plan="auto") for name in MODELS}
    for case, (name, config, options) in CASES.items():
        calls[0] = 0
        found[case] = generated(models[name], name, config, options) | dict(calls=calls[0])
    with mixkv.patched(models["llama"], **BASE):
        found["patched"] = models["llama"].generate(**zoo.inputs("llama", 44), max_new_tokens=8, do_sample=False)
    found["refused"] = refusals(models["llama"], folder)
    mesh = next(iter(tensor_parallel._meshes.values()))
    found["layers"] = {(method, seed): layers(mesh, method, seed) for method in TIED for seed in range(4)}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def refusals(model, folder):
    """The errors of saving, of loading a file of all heads, and of heads whose others are unknown or not as many."""
    cache = mixkv.MixKVCache(model, **BASE)
    model.generate(**zoo.inputs("llama", 44), past_key_values=cache, max_new_tokens=2, do_sample=False)
    told = []
    for action in (
        lambda: cache.save(f"{folder}/never.mixkv"),
        lambda: mixkv.MixKVCache.load(f"{folder}/whole.mixkv", model),
        lambda: tensor_parallel.shard_of(attention(None), HEADS // RANKS),
        lambda: tensor_parallel.shard_of(model.get_decoder().layers[0].self_attn, HEADS - 1),
    ):
        with pytest.raises(ValueError) as error:
            action()
        told.append(str(error.value))
    return told


TIED = [name for name, method in registry.METHODS.items() if method.tensor_parallel]


def layers(mesh, method, seed):
    """The rows that this process keeps of three layers, and those that one process with all heads would keep for it.

    Few different values make ties; after the prompt the layers are compressed again and again.
    """
    generator = torch.Generator().manual_seed(seed)
    config = MixKVConfig(
        method=method, score="output", budget=12, window=4, decode_budget=10, decode_slack=2, profile=PROFILE, backend="torch"
    )
    caches = {
        part: [MixKVLayer(shared, layer) for layer in range(3)] for part, shared in ((p, Shared(config, 3)) for p in (0, 1))
    }
    modules = {part: [attention(mesh if part else None) for _ in range(3)] for part in (0, 1)}
    mask = torch.arange(40) >= torch.tensor([[0], [9]])

    def step(tokens, act):
        for index in range(3):
            scale = torch.rand(1, HEADS, 1, 1, generator=generator) * 3
            query = torch.randint(-1, 2, (2, 2 * HEADS, min(tokens, 4), 8), generator=generator).float()
            key = torch.randint(-1, 2, (2, HEADS, tokens, 8), generator=generator).float()
            value = (torch.randint(-1, 2, (2, HEADS, tokens, 8), generator=generator) * scale).round()
            for part in (0, 1):
                own = mesh.get_local_rank() if part else slice(None)
                cut = [
                    whole.view(2, RANKS, -1, *whole.shape[2:])[:, own].flatten(1, -3) if part else whole
                    for whole in (query, key, value)
                ]
                act(caches[part][index], modules[part][index], *cut)

    step(40, lambda layer, module, *new: layer.fill(module, *new, new[0].transpose(1, 2), mask, LogitOptions(0.4)))
    kept = [compare(caches, mesh)]

    def decode(layer, module, query, key, value):
        layer.seen, layer.arrived = layer.seen + 1, 1
        layer.decode(query, key, value, layer.seen - 1, LogitOptions(0.4))
        layer.enforce_budgets(query, query, None, layer.seen)

    for _ in range(9):
        step(1, decode)
        kept.append(compare(caches, mesh))
    return kept


def attention(mesh):
    """What a layer knows of its attention module: whose heads are spread over ``mesh``, if there is one."""
    module = nn.Module()
    module.config = SimpleNamespace(num_attention_heads=2 * HEADS)
    module.num_key_value_groups = 2
    if mesh is not None:
        tensor_parallel._meshes[module] = mesh
    return module


def compare(caches, mesh):
    """Rows held (mine, expected), layer by layer."""
    first = mesh.get_local_rank() * HEADS // RANKS
    return [
        (mine.kept(), [row[first : first + HEADS // RANKS] for row in whole.kept()])
        for whole, mine in zip(caches[0], caches[1])
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, and the folder of the models."""
    folder = str(tmp_path_factory.mktemp("parallel"))
    for name in MODELS:
        zoo.build(name, "sdpa", num_attention_heads=2 * HEADS, num_key_value_heads=HEADS).save_pretrained(f"{folder}/{name}")
    cache = mixkv.MixKVCache(model := load(folder, "llama"), **BASE)
    model.generate(**zoo.inputs("llama", 44), past_key_values=cache, max_new_tokens=2, do_sample=False)
    cache.save(f"{folder}/whole.mixkv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (folder, port), nprocs=RANKS)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(RANKS)], folder


def together(parts):
    """[B][heads] of all processes, from those of each."""
    return [sum(rows, start=[]) for rows in zip(*parts)]


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(found, case):
    ranks, folder = found
    name, config, options = CASES[case]
    expected = generated(load(folder, name), name, config, options)
    mine = [rank[case] for rank in ranks]
    whole = name == "phi3"
    for rank in mine:
        assert torch.equal(rank["tokens"], expected["tokens"])
        assert rank["output_norm"] == expected["output_norm"]
        for share, other in zip(rank["share"], expected["share"], strict=True):
            assert share == pytest.approx(other) if other is not None else share is None
    for index, rows in enumerate(expected["kept"]):
        if rows is None:
            assert all(rank["kept"][index] is None for rank in mine)
            continue
        held = mine[0]["kept"][index] if whole else together([rank["kept"][index] for rank in mine])
        for heads, others in zip(held, rows, strict=True):
            assert all(map(torch.equal, heads, others)) and len(heads) == len(others) == HEADS
        redundancy = torch.cat([rank["redundancy"][index] for rank in mine[: 1 if whole else RANKS]], dim=1)
        torch.testing.assert_close(redundancy, expected["redundancy"][index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_at_most_one_collective_a_layer_and_compression(found, case):
    name, config, _ = CASES[case]
    layers = found[0][0][case]["compressed"]
    calls = {rank[case]["calls"] for rank in found[0]}
    assert len(calls) == 1
    if name == "phi3":
        # The output projection alone is shared out: it is gathered once a model.
        assert calls == {layers}
    elif not registry.method(config.get("method", "global")).uses_importance:
        assert calls == {0}
    elif "decode_budget" not in config:
        assert calls == {2 * layers if "turns" in config else layers}


@pytest.mark.parametrize("method", TIED)
def test_ties_and_decode_budgets_fall_as_in_one_process(found, method):
    """Exactly equal inputs, many equal scores."""
    for rank in found[0]:
        for seed in range(4):
            for step in rank["layers"][method, seed]:
                for mine, expected in step:
                    for heads, others in zip(mine, expected, strict=True):
                        assert all(map(torch.equal, heads, others)) and len(heads) == len(others) == HEADS // RANKS


def test_patched(found):
    model = load(found[1], "llama")
    with mixkv.patched(model, **BASE):
        tokens = model.generate(**zoo.inputs("llama", 44), max_new_tokens=8, do_sample=False)
    for rank in found[0]:
        assert torch.equal(rank["patched"], tokens)


def test_what_is_refused(found):
    for rank in found[0]:
        saving, loading, unknown, unequal = rank["refused"]
        assert "only this process's heads" in saving
        assert "this model is tensor-parallel" in loading
        assert "holds 2 of 4 KV heads, and it is not known which processes hold the others" in unknown
        assert "holds 3 of 4 KV heads in one of 2 processes" in unequal
