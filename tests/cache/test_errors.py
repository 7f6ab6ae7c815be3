"""Bad input is told by name, with the remedy, and loses nothing."""

import json

import pytest
import torch
import transformers
from support import zoo

import mixkv
from mixkv import MixKVCache, MixKVConfig

SMALL = dict(budget=14, window=6)


def forward(model, cache, prompts=None, **extra):
    prompts = prompts or zoo.inputs("llama", 40)
    with torch.no_grad():
        return model(**prompts, past_key_values=cache, **extra).logits


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="snap"), "unknown method 'snap'; choose from snapkv"),
        (dict(score="mixx"), "unknown score 'mixx'; choose from mix"),
        (dict(budget=32), "budget=32 must exceed window=32"),
        (dict(budget=0), "budget=0 must exceed"),
        (dict(budget=-1), "budget=-1 must exceed"),
        (dict(budget=1.5), r"budget=1.5 as a share .* \(0, 1\]"),
        (dict(budget=0.0), "budget=0.0 as a share"),
        (dict(budget="64"), "budget='64' is no number of bytes"),
        (dict(budget=True), "budget=True must be an int"),
        (dict(window=0), "window=0 must be a positive int"),
        (dict(kernel_size=4), "kernel_size=4 must be odd"),
        (dict(pooling="sum"), "unknown pooling 'sum'"),
        (dict(group_reduce="min"), "unknown group_reduce 'min'"),
        (dict(ada_floor=2), "ada_floor=2 must be a number from 0 to 1"),
        (dict(method="sparsemm"), "method='sparsemm' needs profile="),
        (dict(profile=[[1, 2], [3]]), r"rows of one length, got row lengths \[2, 1\]"),
        (dict(profile=[["a"]]), "profile must be a table of numbers"),
        (dict(profile=[[0.0]]), "positive sum"),
        (dict(profile="/no/such/file.json"), "profile file /no/such/file.json does not exist"),
        (dict(redundancy="offline"), "unknown redundancy 'offline'"),
        (dict(redundancy=[[1.5]]), "numbers from 0 to 1"),
        (dict(redundancy=[[float("nan")]]), "finite"),
        (dict(decode_budget=20), "decode_budget=20 must exceed window=32"),
        (dict(decode_budget=0), "decode_budget=0 must be a positive int"),
        (dict(offloading=True), "offloading=True is not supported"),
        (dict(budgett=3), "unknown option budgett=3; MixKVConfig has"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        MixKVCache(**options)


def test_config_goes_through_json():
    config = MixKVConfig(method="sparsemm", profile=torch.rand(3, 4), redundancy=[[0.1, 0.2]] * 3, budget=0.25)
    assert MixKVConfig.from_json(config.to_json()) == config
    assert MixKVConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(MixKVConfig.from_json(config.to_json()))
    with pytest.raises(ValueError, match="unknown option colour='red'"):
        MixKVConfig.from_dict({"colour": "red"})


def test_profile_files(tmp_path):
    table = [[0.5, 1.0], [2.0, 0.0]]
    for name, content in {
        "table": table,
        "mapping": {"0-0": 0.5, "0-1": [0.5, 1.5], "1-0": [2.0], "1-1": 0.0},
    }.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        assert MixKVConfig(method="sparsemm", profile=str(path)).profile == tuple(map(tuple, table))
        assert MixKVConfig(method="sparsemm", profile=path).profile == tuple(map(tuple, table))
    mixkv.head_profile.save(table, tmp_path / "saved.json")
    assert mixkv.head_profile.load(tmp_path / "saved.json") == tuple(map(tuple, table))
    for content, message in [
        ("{", "is not JSON"),
        ('{"0-0": 1, "1-1": 1}', "heads are missing: 0-1, 1-0"),
        ('{"a": 1}', "'a' is not of the form 'layer-head'"),
        ('{"0-0": "x"}', "'0-0' must hold a number"),
        ("{}", "no heads"),
        ("[[1, 2], [3]]", "rows of one length"),
    ]:
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message) as info:
            MixKVConfig(profile=str(path))
        assert "bad.json" in str(info.value)


def test_tables_of_another_shape():
    model = zoo.build("llama")
    with pytest.raises(ValueError, match=r"profile has shape \[2, 4\], but the model has 3 compressed layers of 2 KV heads"):
        forward(model, MixKVCache(model, method="sparsemm", profile=torch.ones(2, 4), **SMALL))
    with pytest.raises(ValueError, match=r"redundancy table has shape \[3, 5\]"):
        forward(model, MixKVCache(model, redundancy=[[0.5] * 5] * 3, **SMALL))


def test_right_padding_is_refused_and_the_cache_stays_usable():
    model = zoo.build("llama")
    cache = MixKVCache(model, **SMALL)
    prompts = zoo.inputs("llama", 40, batch=2)
    padded = dict(prompts, attention_mask=prompts["attention_mask"].clone())
    padded["attention_mask"][1, -5:] = 0
    with pytest.raises(ValueError, match=r"batch rows \[1\] are padded on the right.*padding_side"):
        forward(model, cache, padded)
    assert cache.get_seq_length() == 0
    assert torch.equal(forward(model, cache, prompts), forward(model, MixKVCache(model, **SMALL), prompts))


def test_training_with_gradients():
    model = zoo.build("llama").train()
    prompts = zoo.inputs("llama", 40)
    with pytest.raises(RuntimeError, match=r"training mode.*model.eval\(\)"):
        model(**prompts, past_key_values=MixKVCache(model, **SMALL))
    model.eval()
    assert model(**prompts, past_key_values=MixKVCache(model, **SMALL)).logits.requires_grad


def test_another_batch_size():
    model = zoo.build("llama")
    cache = MixKVCache(model, **SMALL)
    forward(model, cache)
    with pytest.raises(ValueError, match="holds a batch of 1 and was given 2 rows: make a new cache"):
        forward(model, cache, zoo.inputs("llama", 4, batch=2))
    assert cache.get_seq_length() == 40


def test_another_model():
    model = zoo.build("llama")
    cache = MixKVCache(model, **SMALL)
    forward(model, cache)
    twin = zoo.build("llama", seed=1)
    with pytest.raises(RuntimeError, match="never met its compressed cache"):
        forward(twin, cache, zoo.inputs("llama", 4))
    cache = MixKVCache(model, **SMALL)
    forward(model, cache)
    mixkv.patch(twin)
    with pytest.raises(ValueError, match="filled by another LlamaAttention"):
        forward(twin, cache, zoo.inputs("llama", 4))
    with pytest.raises(ValueError, match="belongs to another model"):
        forward(zoo.build("qwen3"), cache, zoo.inputs("qwen3", 4))
    larger = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dict(zoo.FAMILIES["llama"].config, num_hidden_layers=5)))
    cache = MixKVCache(model, **SMALL)
    with pytest.raises((ValueError, RuntimeError)):
        forward(larger.eval(), cache)


def test_an_attention_that_never_met_the_cache_is_an_error():
    model = zoo.build("llama")
    cache = MixKVCache(model, **SMALL)
    mixkv.unpatch(model)
    with pytest.raises(RuntimeError, match="never met its compressed cache"):
        forward(model, cache)
    with pytest.raises(RuntimeError, match="never met"):
        cache.stats()
    with pytest.raises(RuntimeError, match="never met"):
        cache.kept(0)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: transformers.T5ForConditionalGeneration(_tiny(transformers.T5Config, d_model=16, d_kv=8, d_ff=16)),
            "encoder-decoder",
        ),
        (lambda: transformers.DeepseekV3ForCausalLM(_tiny(transformers.DeepseekV3Config, first_k_dense_replace=2)), "latent"),
        (
            lambda: transformers.MistralForCausalLM(_tiny(transformers.MistralConfig, sliding_window=8)),
            r"no full-attention layer \(sliding_window=8\)",
        ),
        (lambda: transformers.BloomForCausalLM(_tiny(transformers.BloomConfig)), "attention interface"),
    ],
    ids=["t5", "mla", "sliding", "bloom"],
)
def test_unsupported_models(build, message):
    model = build()
    for use in (lambda: mixkv.patch(model), lambda: MixKVCache(model)):
        with pytest.raises(ValueError, match=message):
            use()


def _tiny(kind, **more):
    return kind(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )


def test_not_a_model():
    with pytest.raises(ValueError, match="PreTrainedModel, not Linear"):
        mixkv.patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pass a config by keyword"):
        MixKVCache(MixKVConfig())


def test_unsupported_attention_implementation():
    model = zoo.build("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation='flex_attention', which is not supported"):
        mixkv.patch(model)


def test_offloading_through_generate():
    model = zoo.build("llama")
    mixkv.patch(model, **SMALL)
    with pytest.raises(ValueError, match="cache_implementation='offloaded' and mixkv exclude each other"):
        model.generate(**zoo.inputs("llama", 40), max_new_tokens=2, cache_implementation="offloaded")


def test_another_cache_on_request_is_told():
    model = zoo.build("llama")
    prompts = zoo.inputs("llama", 40)
    plain = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    mixkv.patch(model, **SMALL)
    with pytest.warns(UserWarning, match="not compressed by mixkv"):
        tokens = model.generate(**prompts, max_new_tokens=4, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(tokens, plain)
    own = model.generate(**prompts, max_new_tokens=4, do_sample=False, past_key_values=transformers.DynamicCache())
    assert torch.equal(own, plain)
    assert torch.equal(model.generate(**prompts, max_new_tokens=4, do_sample=False, use_cache=False), plain)


def test_bare_cache_away_from_a_model():
    with pytest.raises(RuntimeError, match=r"MixKVCache\(model, ...\)"):
        MixKVCache().update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
