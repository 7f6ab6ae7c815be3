"""An exception anywhere in a cache's code leaves the cache as it was, or broken in so many words until it is reset.

Faults are injected by a trace function: as a RuntimeError where any function of the library begins, of transformers' attention
function, or of an MLP; and as a KeyboardInterrupt at any line of the library. Of transformers' cache the same.
"""

import copy
import inspect
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support import linear_models, zoo

import mixkv
from mixkv import MixKVCache

LIBRARY = (str(Path(mixkv.__file__).parent), transformers.cache_utils.__file__)
METHODS = {
    "snapkv": dict(method="snapkv", budget=14, window=6, kernel_size=3),
    "bounded": dict(method="adakv", budget=14, window=6, kernel_size=3, decode_budget=16, decode_slack=1),
    "global": dict(method="global", score="mix-output", budget=14, window=6, kernel_size=3),
    "hybridkv": dict(method="hybridkv", budget=40, window=6, hybrid_threshold=0.5, hybrid_chunk=4),
}
LENGTH = 64
# Faults of each kind and test at most; more are thinned out evenly.
MOST = 10


class Fault(RuntimeError):
    pass


class Tracer:
    """Counts the places where a fault may occur, and lets one occur at the place ``at``."""

    def __init__(self, model, kind, at=None):
        self.kind, self.at, self.count = kind, at, 0
        layers = model.get_decoder().layers
        self.others = {type(layers[0].mlp).forward.__code__} if hasattr(layers[0], "mlp") else set()
        self.others.add(transformers.integrations.sdpa_attention.sdpa_attention_forward.__code__)
        self.last_mlp = getattr(layers[-1], "mlp", None)

    def __enter__(self):
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, argument):
        # Python ignores an exception where it closes a generator.
        ours = frame.f_code.co_filename.startswith(LIBRARY) and not frame.f_code.co_flags & inspect.CO_GENERATOR
        if self.kind == "call":
            # What comes after the last layer of a cache is not its business.
            other = frame.f_code in self.others and frame.f_locals.get("self") is not self.last_mlp
            if ours or other:
                self._occur()
            return None
        return self._trace_line if ours else None

    def _trace_line(self, frame, event, argument):
        if event == "line":
            self._occur()
        return self._trace_line

    def _occur(self):
        self.count += 1
        if self.count - 1 == self.at:
            raise Fault("injected") if self.kind == "call" else KeyboardInterrupt("injected")


def forward(model, cache, **inputs):
    with torch.no_grad():
        return model(past_key_values=cache, **inputs).logits


def generate(model, cache, inputs, **options):
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True) | options
    return torch.stack(model.generate(**inputs, past_key_values=cache, **options).logits, dim=1)


def tokens(count, batch=1, seed=1):
    return torch.randint(zoo.TEXT.start, zoo.TEXT.stop, (batch, count), generator=torch.Generator().manual_seed(seed))


class Step:
    """One use of a cache: what comes before it, and it."""

    def __init__(self, model, options, batch=1):
        self.model, self.options, self.batch = model, options, batch
        self.prompts = dict(input_ids=tokens(LENGTH, batch))

    def new(self):
        return MixKVCache(self.model, **self.options)

    def prepare(self, cache):
        forward(self.model, cache, **self.prompts)
        for seed in (2, 3):
            forward(self.model, cache, input_ids=tokens(1, self.batch, seed))


class Prefill(Step):
    def prepare(self, cache):
        pass

    def run(self, cache):
        return forward(self.model, cache, **self.prompts)


class ChunkedPrefill(Prefill):
    def run(self, cache):
        return generate(self.model, cache, self.prompts, prefill_chunk_size=24)


class Drafts(Prefill):
    def run(self, cache):
        self.prompts["input_ids"][:, -12:] = self.prompts["input_ids"][:, :12]
        return generate(self.model, cache, self.prompts, prompt_lookup_num_tokens=4, max_new_tokens=6)


class Decode(Step):
    def run(self, cache):
        return forward(self.model, cache, input_ids=tokens(1, self.batch, 5))


class Extend(Step):
    def run(self, cache):
        return forward(self.model, cache, input_ids=tokens(7, self.batch, 5))


class PaddedExtend(Step):
    def __init__(self, model, options):
        super().__init__(model, options, batch=2)

    def run(self, cache):
        mask = torch.ones(2, LENGTH + 9, dtype=torch.long)
        mask[1, LENGTH + 2 : LENGTH + 5] = 0
        return forward(self.model, cache, input_ids=tokens(7, 2, 5), attention_mask=mask)


class Crop(Step):
    def run(self, cache):
        cache.crop(-1)
        return None


class Reorder(Step):
    def __init__(self, model, options):
        super().__init__(model, options, batch=2)

    def run(self, cache):
        cache.reorder_cache(torch.tensor([1, 1]))
        return None


def summary(cache):
    numbers = cache.stats()
    kept = [cache.kept(layer) for layer in range(len(cache.layers))]
    lists = [None if layer is None else [[part.tolist() for part in row] for row in layer] for layer in kept]
    return numbers["seen"], numbers["rows"], [layer if layer is None else layer.tolist() for layer in numbers["lengths"]], lists


def assert_consistent(cache):
    """Every layer holds the same tokens, and the host's counts are the device's."""
    seen = cache.stats()["seen"]
    for layer in cache.layers:
        if hasattr(layer, "nbytes_full") or getattr(layer, "is_sliding", False):
            assert layer.get_seq_length() == seen
        store = getattr(layer, "store", None)
        if store is not None:
            lengths = store.lengths.view(store.batch, store.heads)
            assert store.row_totals == lengths.sum(-1).tolist() and lengths.max() <= store.max_length


def assert_broken(step, cache, path):
    """Every use says so, and what to do."""
    uses = [
        cache.stats,
        lambda: cache.kept(0),
        lambda: cache.save(path / "broken"),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.zeros(step.batch, dtype=torch.long)),
        lambda: forward(step.model, cache, input_ids=tokens(1, step.batch)),
        lambda: copy.deepcopy(cache).stats(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            use()
    assert "MixKVCache" in repr(cache)


def same(logits, expected):
    return logits is None and expected is None or torch.allclose(logits, expected, atol=1e-5)


def check_faults(step, kind, path):
    """Lets a fault occur at each place of ``step`` in turn; returns how many left the cache broken, and how many as it was."""
    prepared = step.new()
    step.prepare(prepared)
    before = prepared.get_seq_length()
    step.run(copy.deepcopy(prepared))
    whole = copy.deepcopy(prepared)
    counter = Tracer(step.model, kind)
    with counter:
        expected = step.run(whole)
    expected_summary = summary(whole)
    places = range(0, counter.count, max(1, counter.count // MOST))
    broken = as_before = 0
    for at in places:
        cache = copy.deepcopy(prepared)
        with pytest.raises((Fault, KeyboardInterrupt), match="injected"), Tracer(step.model, kind, at):
            step.run(cache)
        try:
            cache.stats()
        except RuntimeError:
            broken += 1
            assert_broken(step, cache, path)
        else:
            assert_consistent(cache)
            if cache.get_seq_length() == before:
                as_before += 1
                assert same(step.run(cache), expected), f"at {at}"
                assert summary(cache) == expected_summary, f"at {at}"
            elif not isinstance(step, (ChunkedPrefill, Drafts)):  # those are several forwards
                # The fault came behind the last layer: all tokens have been read.
                assert summary(cache) == expected_summary
                rest = [forward(step.model, copy.deepcopy(part), input_ids=tokens(1, step.batch, 6)) for part in (cache, whole)]
                assert torch.allclose(*rest, atol=1e-5)
        cache.reset()
        step.prepare(cache)
        assert same(step.run(cache), expected), f"after a fault at {at} and reset()"
        assert summary(cache) == expected_summary
    assert same(step.run(copy.deepcopy(prepared)), expected)
    return broken, as_before


STEPS = [Prefill, ChunkedPrefill, Decode, Extend, PaddedExtend, Drafts, Crop, Reorder]


@pytest.mark.parametrize("kind", ["call", "line"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_faults(step, method, kind, tmp_path):
    broken, as_before = check_faults(step(zoo.build("llama"), METHODS[method]), kind, tmp_path)
    assert broken + as_before > 0


HYBRIDS = {
    "gemma3": lambda: zoo.build("gemma3"),
    "conv first": lambda: linear_models.lfm2("conv", "full_attention", "conv", "full_attention"),
    "mamba": lambda: linear_models.granite("mamba", "attention", "mamba", "attention"),
    "conv last": lambda: linear_models.lfm2("full_attention", "conv", "full_attention", "conv"),
}


@pytest.mark.parametrize("kind", ["call", "line"])
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("step", [Prefill, Decode, Extend, Reorder], ids=lambda step: step.__name__)
def test_faults_beside_stock_layers(step, name, kind, tmp_path):
    model = HYBRIDS[name]()
    broken, as_before = check_faults(step(model, METHODS["global"]), kind, tmp_path)
    assert broken + as_before > 0


def test_an_interrupted_prompt_can_be_read_again(monkeypatch):
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 40, batch=2)
    expected = forward(model, MixKVCache(model, **METHODS["global"]), **prompts)
    cache = MixKVCache(model, **METHODS["global"])

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mixkv.ops.dispatch, "gather", interrupted)
        forward(model, cache, **prompts)
    assert cache.get_seq_length() == 0 and not cache and cache.stats()["bytes"] == 0
    assert torch.equal(forward(model, cache, **prompts), expected)


def test_a_decode_step_that_failed_in_a_later_layer():
    model = zoo.build("llama")
    cache = MixKVCache(model, **METHODS["snapkv"])
    forward(model, cache, **zoo.inputs("llama", 40))
    copied = copy.deepcopy(cache)
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, cache, input_ids=tokens(1))
    hook.remove()
    with pytest.raises(RuntimeError, match=r"a forward was cut off .* Call cache.reset\(\) .* copy"):
        forward(model, cache, input_ids=tokens(1))
    assert repr(cache).endswith("broken: call reset())") and "broken" in cache._repr_html_()
    assert torch.isfinite(forward(model, copied, input_ids=tokens(1))).all()


def test_a_cache_that_cannot_be_cropped_is_unchanged():
    model = zoo.build("llama")
    cache = MixKVCache(model, **METHODS["snapkv"])
    forward(model, cache, **zoo.inputs("llama", 40))
    forward(model, cache, input_ids=tokens(3))
    with pytest.raises(ValueError, match="cannot crop 4 tokens"):
        cache.crop(-4)
    assert cache.stats()["seen"] == 43
    cache.crop(-3)
    assert cache.stats()["seen"] == 40
