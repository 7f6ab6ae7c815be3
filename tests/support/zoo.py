"""Tiny random models of every supported family, and prompts for them.

    model = zoo.build("qwen2_vl", "sdpa")
    prompts = zoo.inputs("qwen2_vl", length=24, batch=2)
    model.generate(**prompts, max_new_tokens=4, do_sample=False)

Weights are scaled for attention that is neither uniform nor one-hot, so that selections and logits differ visibly.
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn

from support import zoo_images as pictures

VOCAB = 128
PAD, BOS = 0, 1
TEXT = range(4, 120)  # ordinary tokens
EOS, START, END, VIDEO, IMAGE = range(123, 128)
SPECIAL = [PAD, *range(TEXT.stop, VOCAB)]  # never the most likely
WINDOW = 16  # of sliding layers


@dataclass(frozen=True)
class Family:
    """A model family: what `build` constructs, with `sdpa_config` changing `config` for sdpa."""

    name: str
    model_class: str
    config: dict
    picture: pictures.Picture | None = None
    sdpa_config: dict = field(default_factory=dict)
    notes: str = ""

    @property
    def text_config(self) -> dict:
        return self.config.get("text_config", self.config)

    @property
    def vision(self) -> bool:
        return self.picture is not None

    @property
    def has_sliding(self) -> bool:
        return "sliding_attention" in self.text_config.get("layer_types", ())

    @property
    def min_length(self) -> int:
        """Shortest prompt: a text token on either side of the image and its two markers."""
        return self.picture.tokens + 4 if self.vision else 1

    @property
    def attn(self) -> tuple[str, ...]:
        """Implementations among eager and sdpa that the installed transformers has for the family."""
        return ("eager", "sdpa") if getattr(transformers, self.model_class)._supports_sdpa else ("eager",)


def _text(head_dim, **changes):
    """Config of a text model with 4 query and 2 KV heads."""
    base = dict(
        vocab_size=VOCAB,
        hidden_size=4 * head_dim,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    return base | changes


def _layers(*kinds):
    """Layer types, and the window of the sliding ones."""
    return dict(num_hidden_layers=len(kinds), layer_types=[f"{kind}_attention" for kind in kinds], sliding_window=WINDOW)


def _mrope(*section, **more):
    return dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=list(section), **more))


def _vlm(name, model_class, picture, text, text_type=None, **changes):
    """A vision family, with its text model of type `text_type` (or the type that is built in)."""
    text = dict(text, model_type=text_type) if text_type else text
    config = dict(text_config=text, vision_config=picture.tower, tie_word_embeddings=False, **changes)
    return Family(name, model_class, config, picture)


_QWEN_IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_GEMMA3_IDS = dict(image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END, mm_tokens_per_image=9)
_IDEFICS3_IDS = dict(image_token_id=IMAGE, pad_token_id=PAD)
_GEMMA3 = _text(64, hidden_size=64, query_pre_attn_scalar=64, **_layers("sliding", "full", "sliding"))
_PINPOINTS = dict(image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]])

_FAMILIES = [
    Family("llama", "LlamaForCausalLM", _text(16, num_hidden_layers=3)),
    Family("mistral", "MistralForCausalLM", _text(32, sliding_window=None)),
    Family("qwen2", "Qwen2ForCausalLM", _text(16)),
    Family("qwen3", "Qwen3ForCausalLM", _text(32, hidden_size=64)),
    Family("phi3", "Phi3ForCausalLM", _text(16, original_max_position_embeddings=4096)),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _text(32, hidden_size=64, query_pre_attn_scalar=32, attn_logit_softcapping=4.0, **_layers("sliding", "full")),
        sdpa_config=dict(attn_logit_softcapping=None),
        notes="sdpa knows no soft cap: built without it there; transformers 5.23 refuses sdpa altogether",
    ),
    Family("gemma3", "Gemma3ForCausalLM", _GEMMA3),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        _text(
            64,
            hidden_size=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
            **_layers("sliding", "full"),
        ),
        notes="attention sinks, eager only; mixture of experts",
    ),
    _vlm("gemma3_vision", "Gemma3ForConditionalGeneration", pictures.GEMMA3, _GEMMA3, **_GEMMA3_IDS),
    _vlm(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        pictures.qwen2_vl(hidden=64),
        _text(16, **_mrope(2, 3, 3)),
        **_QWEN_IDS,
    ),
    _vlm(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        pictures.qwen2_5_vl(hidden=128),
        _text(32, **_mrope(4, 6, 6)),
        **_QWEN_IDS,
    ),
    _vlm(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        pictures.qwen3_vl(hidden=64),
        _text(32, hidden_size=64, **_mrope(6, 5, 5, mrope_interleaved=True)),
        **_QWEN_IDS,
    ),
    _vlm("llava", "LlavaForConditionalGeneration", pictures.LLAVA, _text(16), "llama", image_token_index=IMAGE),
    _vlm(
        "llava_next",
        "LlavaNextForConditionalGeneration",
        pictures.LLAVA_NEXT,
        _text(16, sliding_window=None),
        "mistral",
        image_token_index=IMAGE,
        **_PINPOINTS,
    ),
    _vlm(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        pictures.LLAVA_ONEVISION,
        _text(32),
        "qwen2",
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **_PINPOINTS,
    ),
    _vlm(
        "internvl",
        "InternVLForConditionalGeneration",
        pictures.INTERNVL,
        _text(16),
        "qwen2",
        image_token_id=IMAGE,
        image_seq_length=9,
    ),
    _vlm("smolvlm", "SmolVLMForConditionalGeneration", pictures.IDEFICS3, _text(16), "llama", **_IDEFICS3_IDS),
    _vlm("idefics3", "Idefics3ForConditionalGeneration", pictures.IDEFICS3, _text(32), "llama", **_IDEFICS3_IDS),
    _vlm(
        "mllama",
        "MllamaForConditionalGeneration",
        pictures.MLLAMA,
        _text(16, num_hidden_layers=3, cross_attention_layers=[1]),
        image_token_index=IMAGE,
    ),
]
FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES}


def cases(vision=None, sliding=None, attn=("eager", "sdpa")):
    """Parameters (name, attn_implementation) for every family that matches."""
    for family in FAMILIES.values():
        if vision not in (None, family.vision) or sliding not in (None, family.has_sliding):
            continue
        for implementation in family.attn:
            if implementation in attn:
                yield pytest.param(family.name, implementation, id=f"{family.name}-{implementation}")


def build(name, attn_implementation="sdpa", seed=0, **changes):
    """A random model in eval mode and float32; the same weights for every `attn_implementation`. `changes` go to its config."""
    family = FAMILIES[name]
    cls = getattr(transformers, family.model_class)
    changes = (family.sdpa_config if attn_implementation == "sdpa" else {}) | changes
    config = cls.config_class(**copy.deepcopy(family.config | changes))
    auto = transformers.AutoModelForImageTextToText if family.vision else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32).eval()
        _randomise(model)
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return model


@torch.no_grad()
def _randomise(model):
    """Unit-variance activations throughout, queries and keys half as large again, special tokens never the best."""

    def normal(weight, std=1.0):
        return torch.randn(weight.shape) * std

    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            full_name = f"{path}.{name}"
            if isinstance(module, nn.Embedding):
                weight.copy_(normal(weight) / getattr(module, "embed_scale", 1.0))
            elif weight.ndim >= 2:
                fan_in = weight[0].numel() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) else weight.shape[-2]
                gain = 1.5 if any(part in full_name for part in ("q_proj", "k_proj", "qkv")) else 1.0
                weight.copy_(normal(weight, gain / math.sqrt(fan_in)))
            else:
                raised = any(part in full_name for part in ("q_norm", "k_norm", "gate"))
                weight.add_(normal(weight, 0.1) + 0.5 * raised + 3.0 * ("sinks" in full_name))
    head = model.get_output_embeddings().weight
    head.mul_(2.0)
    head[SPECIAL] *= 0.01


def inputs(name, length, batch=1, seed=0, images=True):
    """`generate()` arguments for `batch` random prompts of exactly `length` columns."""
    return ragged(name, [length] * batch, seed, images)[0]


def ragged(name, lengths, seed=0, images=True):
    """Prompts of several lengths: (one left-padded batch, [each prompt alone])."""
    rows = [_row(FAMILIES[name], length, 1000 * seed + row, images) for row, length in enumerate(lengths)]
    padded = [left_pad(name, row, max(lengths) - length) for row, length in zip(rows, lengths)]
    return _join(padded), rows


def left_pad(name, inputs, pad):
    """The same prompts behind `pad` columns of padding."""
    picture = FAMILIES[name].picture
    columns = ("input_ids", "attention_mask") + (picture.aligned if picture else ())
    padded = dict(inputs)
    for key in columns:
        if key in inputs:
            value = inputs[key]
            blank = value.new_full((value.shape[0], pad, *value.shape[2:]), PAD if key == "input_ids" else 0)
            padded[key] = torch.cat([blank, value], dim=1)
    return padded


def _join(rows):
    """One batch of equally long rows."""
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def _row(family, length, seed, with_image):
    """One prompt: random text, and for a vision family its image between two markers at a random place."""
    least = family.min_length if with_image else 1
    if length < least:
        raise ValueError(f"a {family.name} prompt takes at least {least} columns, not {length}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(TEXT.start, TEXT.stop, (length,), generator=generator)
    row = dict(input_ids=ids[None], attention_mask=torch.ones(1, length, dtype=torch.long))
    if family.vision and with_image:
        tokens = family.picture.tokens
        start = torch.randint(1, length - tokens - 2, (), generator=generator)
        ids[start : start + tokens + 2] = torch.tensor([START, *[IMAGE] * tokens, END])
        row |= family.picture.draw(ids == IMAGE, generator, seed % 2)
    return row
