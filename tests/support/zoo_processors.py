"""Each vision family's own processor, small: a word tokenizer built here, image sizes that fit the towers of the zoo.

    processor = zoo_processors.build("llava_next")
    prompts = zoo_processors.encode(processor, [[wide, square], [square]])     # one prompt a row, left padded
    zoo.build("llava_next").generate(**prompts)

The image processors are the PIL ones: the others need torchvision, whose usual wheels go with a CUDA build of torch only.
Older transformers ask for torchvision all the same for some families, which are skipped there.
"""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from support import zoo

UNKNOWN, TURN = 2, 3
WORDS = range(zoo.TEXT.start, 96)
TAGS = range(WORDS.stop, zoo.TEXT.stop)  # names a family gives to places in an image
_QWEN_PLACE = "<|vision_start|>{}<|vision_end|>"


@dataclass(frozen=True)
class Recipe:
    """How a family's processor is put together.

    tokens: the family's names for the start, end, video and image tokens of the zoo.
    image, image_options: the image processor.
    options: of the processor itself.
    place: what stands for an image in the prompt, before the processor expands it.
    attributes: special tokens that the processor looks up on the tokenizer by attribute: attribute -> token.
    tags: more special tokens of the family.
    """

    processor: str
    image: str
    image_options: dict
    tokens: tuple[str, str, str, str] = ("<start>", "<end>", "<video>", "<image>")
    options: dict | None = None
    place: str = "<image>"
    attributes: dict | None = None
    tags: tuple[str, ...] = ()


_QWEN = dict(
    image="Qwen2VLImageProcessorPil",
    image_options=dict(patch_size=4, size=dict(shortest_edge=64, longest_edge=1024)),
    tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"),
    place=_QWEN_PLACE.format("<|image_pad|>"),
)
_TILE = dict(size=dict(height=24, width=24))
_SPLIT = dict(size=dict(longest_edge=48), max_image_size=dict(longest_edge=24))
_PINPOINTS = [[8, 16], [16, 8], [16, 16]]
_IDEFICS_TAGS = ("<global-img>", *(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)))
_IDEFICS = dict(
    tokens=("<fake_token_around_image>", "<end_of_utterance>", "<video>", "<image>"),
    options=dict(image_seq_len=9),
    tags=_IDEFICS_TAGS,
)

RECIPES = {
    "qwen2_vl": Recipe("Qwen2VLProcessor", **_QWEN),
    "qwen2_5_vl": Recipe("Qwen2_5_VLProcessor", **_QWEN),
    "qwen3_vl": Recipe("Qwen3VLProcessor", **_QWEN),
    "llava": Recipe(
        "LlavaProcessor",
        "LlavaImageProcessorPil",
        dict(size=dict(shortest_edge=12), crop_size=dict(height=12, width=12)),
        options=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    "llava_next": Recipe(
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        dict(size=dict(shortest_edge=8), crop_size=dict(height=8, width=8), image_grid_pinpoints=_PINPOINTS),
        options=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    "llava_onevision": Recipe(
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessorPil",
        dict(size=dict(height=8, width=8), image_grid_pinpoints=_PINPOINTS),
        options=dict(num_image_tokens=4, vision_feature_select_strategy="full"),
    ),
    "internvl": Recipe(
        "InternVLProcessor",
        "GotOcr2ImageProcessorPil",
        dict(_TILE, crop_to_patches=True, min_patches=1, max_patches=4),
        tokens=("<img>", "</img>", "<video>", "<IMG_CONTEXT>"),
        options=dict(image_seq_length=9),
        place="<IMG_CONTEXT>",
        attributes=dict(
            start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
        ),
    ),
    "smolvlm": Recipe("SmolVLMProcessor", "SmolVLMImageProcessorPil", _SPLIT, **_IDEFICS),
    "idefics3": Recipe("Idefics3Processor", "Idefics3ImageProcessorPil", _SPLIT, **_IDEFICS),
    "gemma3_vision": Recipe(
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        _TILE,
        tokens=("<start_of_image>", "<end_of_image>", "<video>", "<image_soft_token>"),
        options=dict(image_seq_length=9),
        place="<start_of_image>",
        attributes=dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"),
    ),
    "mllama": Recipe(
        "MllamaProcessor",
        "MllamaImageProcessorPil",
        dict(size=dict(height=12, width=12), max_image_tiles=2),
        tokens=("<start>", "<end>", "<video>", "<|image|>"),
        place="<|image|>",
    ),
}

_TEMPLATE = (
    "{{% for message in messages %}}<turn> {{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}{{% else %}} {{{{ part['text'] }}}}"
    "{{% endif %}}{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}} <turn>{{% endif %}}"
)


def _images_only(kind):
    """Processor class `kind` that takes anything for its video processor: the real ones all need torchvision."""

    def check(self, name, argument):
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), dict(check_argument_for_proper_class=check))


def build(name, video_processor=None, **image_options):
    """The processor of family `name`; skips the test where the installed packages have none.

    Videos need a real ``video_processor``; ``image_options`` go over the recipe's.
    """
    recipe = RECIPES[name]
    if name == "smolvlm":
        pytest.importorskip("num2words", reason="the SmolVLM processor needs num2words")
    try:
        kind, image_kind = getattr(transformers, recipe.processor), getattr(transformers, recipe.image)
        image_processor = image_kind(**recipe.image_options | image_options)
    except (AttributeError, ImportError) as missing:
        reason = " ".join(str(missing).split())[:80]
        pytest.skip(f"transformers {transformers.__version__} has no {recipe.image} here: {reason}")
    parts = dict(image_processor=image_processor, tokenizer=_tokenizer(recipe))
    if "video_processor" in inspect.signature(kind.__init__).parameters:
        parts["video_processor"] = video_processor or SimpleNamespace(num_frames=1, fps=1)
        kind = kind if video_processor else _images_only(kind)
    template = _TEMPLATE.format(image=recipe.place, video=_QWEN_PLACE.format("<|video_pad|>"))
    return kind(**parts, chat_template=template, **recipe.options or {})


def _tokenizer(recipe):
    names = ["<pad>", "<bos>", "<unknown>", "<turn>", *(f"w{index}" for index in range(WORDS.start, zoo.VOCAB))]
    vocab = {token: index for index, token in enumerate(names)}
    special = dict(zip(TAGS, recipe.tags)) | dict(zip(range(zoo.EOS, zoo.VOCAB), ("<eos>", *recipe.tokens)))
    for index, token in special.items():
        del vocab[f"w{index}"]
        vocab[token] = index
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole = ("<turn>", *special.values())
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unknown>",
        padding_side="left",
        extra_special_tokens=recipe.attributes or {},
    )


def picture(height, width, seed=0):
    """A random PIL image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def words(count, seed):
    """``count`` random words of the tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator)
    return " ".join(f"w{index}" for index in ids.tolist())


def conversation(images, seed, length):
    """One user turn: text, the images, text; ``length`` words in all."""
    before, after = words(length // 2, seed), words(length - length // 2, seed + 1000)
    parts = [dict(type="image", image=image) for image in images]
    return [dict(role="user", content=[dict(type="text", text=before), *parts, dict(type="text", text=after)])]


def encode(processor, rows, seeds=None, lengths=None):
    """``generate()`` arguments for one prompt a row: PIL images ``rows[i]``, ``lengths[i]`` (16) words of seed ``seeds[i]`` (i)."""
    seeds, lengths = seeds or range(len(rows)), lengths or [16] * len(rows)
    text = [
        processor.apply_chat_template(conversation(images, seed, length), add_generation_prompt=True, tokenize=False)
        for images, seed, length in zip(rows, seeds, lengths, strict=True)
    ]
    return dict(processor(text=text, images=rows, padding=True, return_tensors="pt"))


def vision_tools():
    """qwen_vl_utils; skips the test where it, or the torchvision it needs, cannot be had."""
    try:
        import torchvision  # noqa: F401

        return pytest.importorskip("qwen_vl_utils")
    except (ImportError, RuntimeError) as missing:
        pytest.skip(f"videos need qwen-vl-utils and a torchvision built for this torch ({missing})")
