"""Methods and scores of the user's: same signature and same results as built-in ones, names that go with a cache, refusals."""

import ast
import contextlib
import pickle
from pathlib import Path

import pytest
import torch
from support import oracle, zoo

import mixkv
from mixkv import MixKVCache, MixKVConfig, cli, registry, select

SMALL = dict(budget=14, window=6)


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    methods, scores = dict(registry.METHODS), dict(registry.SCORES)
    yield
    for entries, before in ((registry.METHODS, methods), (registry.SCORES, scores)):
        entries.clear()
        entries.update(before)


def draw(batch=1, length=40):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 4, 6, 16), (batch, 2, length, 16), (batch, 2, length, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def longest_last(context):
    """The last head of each layer gets all that it can use."""
    weights = torch.zeros_like(context.candidates, dtype=torch.float32)
    weights[:, -1] = 1.0
    return context.apportion(weights)


def recent(context):
    return torch.arange(context.num_candidates).expand(*context.redundancy.shape, -1)


def test_a_method_and_a_score_of_ones_own_in_select():
    mixkv.register_method("last-head", longest_last)
    mixkv.register_score("recent", recent)
    config = MixKVConfig(method="last-head", score="recent", **SMALL)
    selection = select(*draw(2), config)
    assert selection.lengths.tolist() == [[6, 22]] * 2
    assert selection.positions[0][1].tolist() == list(range(40 - 22, 40))
    assert MixKVConfig.from_json(config.to_json()) == config


def test_a_method_and_a_score_of_ones_own_in_generate():
    """Decoding equals a full cache in which what they evict is masked; so does compressing again under a decode budget."""
    mixkv.register_method("last-head", longest_last)
    mixkv.register_score("recent", recent)
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48, batch=2)
    cache = MixKVCache(model, method="last-head", score="recent", **SMALL)
    tokens, logits = oracle.generate(model, prompts, 4, past_key_values=cache)
    masks = oracle.keep_masks(cache, 48, batch=2)
    assert all(mask.sum(dim=-1).tolist() == [[6, 22]] * 2 for mask in masks)
    mixkv.unpatch(model)
    with oracle.masked(model, masks, 48):
        masked_tokens, masked_logits = oracle.generate(model, prompts, 4)
    assert torch.equal(tokens, masked_tokens)
    assert (logits - masked_logits).abs().max() <= 1e-4

    bounded = MixKVCache(model, method="last-head", score="recent", decode_budget=10, decode_slack=2, **SMALL)
    oracle.generate(model, prompts, 20, past_key_values=bounded)
    assert all(int(lengths.sum()) <= 2 * 2 * 13 for lengths in bounded.stats()["lengths"])


@pytest.mark.parametrize("method", ["adakv", "global"])
def test_a_copy_of_a_built_in_score_selects_the_same(method):
    """What built-in scores see, users' see: the projection of the model included."""
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48)
    built_in = registry.score("mix-output")
    mixkv.register_score("mine", built_in.compute, uses_output_importance=True)
    caches = [MixKVCache(model, method=method, score=score, **SMALL) for score in ("mix-output", "mine")]
    for cache in caches:
        oracle.generate(model, prompts, 1, past_key_values=cache)
    for layer in range(len(caches[0].layers)):
        for mine, expected in zip(caches[1].kept(layer)[0], caches[0].kept(layer)[0], strict=True):
            assert torch.equal(mine, expected)
    assert caches[1].stats()["output_norm"] == ["projection"] * len(caches[0].layers)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_copy_of_a_built_in_method_selects_the_same(name):
    mixkv.register_method("mine", registry.method(name).allocate)
    config = MixKVConfig(method=name, score="mix", **SMALL)
    mine, expected = select(*draw(2), config.replace(method="mine")), select(*draw(2), config)
    assert torch.equal(mine.flat_positions, expected.flat_positions) and torch.equal(mine.lengths, expected.lengths)


def test_a_method_by_output_importance():
    seen = []

    def allocate(context):
        seen.append(context.importance)
        return context.apportion(context.importance.clamp(min=0).sum(dim=-1))

    for uses in (False, True):
        mixkv.register_method("mine", allocate, uses_output_importance=uses)
        config = MixKVConfig(method="mine", score="attn", **SMALL)
        assert select(*draw(), config).lengths.sum() == 28
    assert torch.equal(seen[1], mixkv.selection.rank(*draw(), config.replace(method="global")).importance)
    assert not torch.equal(seen[0], seen[1])


def test_a_score_of_four_arguments():
    def recent(attention, key, value, redundancy):
        assert key.dtype == attention.dtype == torch.float32 and redundancy.shape == attention.shape[:2]
        assert value.dtype == torch.bfloat16
        return torch.arange(attention.shape[-1]).expand_as(attention)

    mixkv.register_score("recent", recent)
    config = MixKVConfig(method="snapkv", score="recent", budget=16, window=6)
    selection = select(*(part.bfloat16() for part in draw()), config)
    assert selection.positions[0][1].tolist() == list(range(24, 40))


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda c: c.attention[..., 1:], r"score 'mine' returned \[1, 2, 33\] for \[1, 2, 34\] candidates"),
        (lambda c: None, r"score 'mine' returned NoneType for \[1, 2, 34\] candidates"),
        (lambda c: c.attention / 0 * 0, "score 'mine' returned nan"),
    ],
)
def test_a_score_that_returns_no_numbers(result, message):
    mixkv.register_score("mine", result)
    with pytest.raises(ValueError, match=message):
        select(*draw(), MixKVConfig(score="mine", **SMALL))


@pytest.mark.parametrize(
    "result, message",
    [
        (
            lambda c: c.candidates[:, :1],
            r"method 'mine' returned torch.int64 \[1, 1\] and must return an integer tensor \[1, 2\]",
        ),
        (lambda c: c.candidates / 2, r"returned torch.float32 \[1, 2\].*context.apportion"),
        (lambda c: 5, "returned int"),
        (lambda c: c.candidates + 1, r"returned \[\[35, 35\]\] entries for \[\[34, 34\]\] candidates"),
        (lambda c: -c.candidates, "keep from 0 to that many"),
    ],
)
def test_a_method_that_returns_no_entries(result, message):
    mixkv.register_method("mine", result)
    with pytest.raises(ValueError, match=message):
        select(*draw(), MixKVConfig(method="mine", score="attn", **SMALL))


@pytest.mark.parametrize("register, kind", [(mixkv.register_method, "method"), (mixkv.register_score, "score")])
def test_what_cannot_be_registered(register, kind):
    for function in (None, 3, "mix", lambda: 0, lambda a, b: 0):
        with pytest.raises(ValueError, match=f"{kind} 'x' was given .*: give a function of one argument"):
            register("x", function)
    for name in ("", "a+b", "a,b", " a", "1", None, 3):
        with pytest.raises(ValueError, match=f"{kind} name {name!r} must be a letter".replace("+", r"\+")):
            register(name, lambda context: context)
    built_in = next(iter(getattr(registry, f"{kind.upper()}S")))
    with pytest.raises(ValueError, match=f"{kind} '{built_in}' is built in: take another name"):
        register(built_in, lambda context: context)
    assert all(entry.built_in for entries in (registry.METHODS, registry.SCORES) for entry in entries.values())
    register("again", lambda context: 1)
    register("again", lambda context: 2)
    assert list(getattr(registry, f"{kind.upper()}S"))[-1] == "again"


@pytest.mark.parametrize("kind", ["method", "score"])
def test_a_cache_that_names_what_is_not_registered(kind, tmp_path):
    model, prompts = zoo.build("llama"), zoo.inputs("llama", 48)
    register = getattr(mixkv, f"register_{kind}")
    register("mine", longest_last if kind == "method" else recent)
    cache = MixKVCache(model, **{kind: "mine"}, **SMALL)
    oracle.generate(model, prompts, 1, past_key_values=cache)
    cache.save(tmp_path / "cache")
    stored = pickle.dumps(cache)
    del getattr(registry, f"{kind.upper()}S")["mine"]
    for load in (
        lambda: MixKVCache.load(tmp_path / "cache", model),
        lambda: pickle.loads(stored),
        lambda: MixKVConfig(**{kind: "mine"}),
    ):
        with pytest.raises(ValueError, match=rf"unknown {kind} 'mine'; .* mixkv.register_{kind}\('mine', function\)"):
            load()
    register("mine", longest_last if kind == "method" else recent)
    for again in (MixKVCache.load(tmp_path / "cache", model), pickle.loads(stored)):
        assert again.stats()["seen"] == cache.stats()["seen"]


def test_the_command_line_takes_registered_names(tmp_path, capsys):
    """Up to the model, which is not read: names are checked before."""
    mixkv.register_method("last-head", longest_last)
    (tmp_path / "text").write_text("word " * 50)
    command = ["compare", "--prompt-file", str(tmp_path / "text"), "--model", str(tmp_path / "none"), "--score", "attn"]
    with contextlib.suppress(SystemExit):
        assert cli.main([*command, "--method", "nothing"]) == 2
    assert "unknown method 'nothing'" in capsys.readouterr().err
    assert cli.main([*command, "--method", "last-head"]) == 2
    assert "unknown method" not in capsys.readouterr().err


def test_no_name_of_a_method_is_tested_outside_the_registry():
    """What depends on the method is declared by its object."""
    package = Path(mixkv.__file__).parent
    files = [file for file in package.rglob("*.py") if file.parts[-2] != "evaluation"]
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} if _tests(node) else set()
            assert not names & registry.METHODS.keys(), f"{file}, line {node.lineno}"


def _tests(node):
    return isinstance(node, (ast.Compare, ast.MatchValue))
