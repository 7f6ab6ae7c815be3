"""The document model: a small reader of cells in front of SmolLM2, as a stock `LlavaForConditionalGeneration`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from ..checked_file import checksum
from ..document.page import CELL, SIDE
from ..document.questions import CHAT_TEMPLATE, IMAGE_TOKEN
from . import InputError, smollm2
from .loaded import Loaded

NAME = "document-vlm"
# Normalization of pixels in [0, 1]: paper is near zero.
MEAN, STD = 0.9, 0.25
WEIGHTS = Path(__file__).parents[1] / "document" / "weights"
READER, LANGUAGE = "reader.safetensors", "language.safetensors"
# The reader's modules, as LLaVA names them.
PARTS = ("vision_tower", "multi_modal_projector")
# The strength of the low-rank update: alpha / rank.
LORA_SCALE = 2.0


def load(
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: str | os.PathLike = WEIGHTS,
) -> Loaded:
    """The trained document model around SmolLM2.

    Args:
        weights: the folder that ``examples/document_vlm/train.py`` wrote; by default the weights that mixkv contains.

    Raises:
        InputError: SmolLM2 cannot be loaded, or the weights are missing, damaged or of another model.
    """
    language, tokenizer = smollm2.load(torch.float32)
    reader, update = read(Path(weights) / READER), read(Path(weights) / LANGUAGE)
    model = assemble(language)
    fill(model, reader, Path(weights) / READER)
    _merge(language, update, Path(weights) / LANGUAGE)
    made = processor(tokenizer)
    return Loaded(model.to(device, dtype).eval(), made.tokenizer, NAME, made, knows_pages=True)


def processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The processor of images and text, with a chat template; ``tokenizer`` is SmolLM2's."""
    try:
        from transformers import SiglipImageProcessorPil as Images
    except ImportError:  # transformers before 5.5
        from transformers import SiglipImageProcessor as Images
    images = Images(size={"height": SIDE * CELL, "width": SIDE * CELL}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def config(text: LlamaConfig, image_token_id: int) -> LlavaConfig:
    """The config of the whole model around SmolLM2's config ``text``."""
    reader = SiglipVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=6,
        image_size=SIDE * CELL,
        patch_size=CELL,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=reader,
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def assemble(language: LlamaForCausalLM, image_token_id: int = 6) -> LlavaForConditionalGeneration:
    """A model around ``language``, whose weights it shares; transformers initializes the reader's."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config(language.config, image_token_id))
    inner = model.model
    inner.vision_tower = type(inner.vision_tower)(model.config.vision_config)
    inner.multi_modal_projector = type(inner.multi_modal_projector)(model.config)
    inner.language_model = language.model
    model.lm_head = language.lm_head
    model.generation_config.eos_token_id = language.generation_config.eos_token_id
    model.generation_config.pad_token_id = language.generation_config.pad_token_id
    return model


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes weights as safetensors, with a checksum that `read` verifies."""
    from safetensors.torch import save_file

    # One metadata entry: safetensors writes several in any order, and the same weights should give the same file.
    save_file(tensors, path, metadata={"sha256": checksum({}, tensors)})


def read(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of `write`.

    Raises:
        InputError: the file is missing or damaged.
    """
    remedy = "install mixkv again, or train it: examples/document_vlm/train.py"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            expected = (file.metadata() or {}).get("sha256")
    except FileNotFoundError as error:
        raise InputError(f"the document model's weights {path} are missing: {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"the document model's weights {path} are damaged ({error}): {remedy}") from error
    if checksum({}, tensors) != expected:
        raise InputError(f"the document model's weights {path} are damaged (their checksum is wrong): {remedy}")
    return tensors


def fill(model: LlavaForConditionalGeneration, state: dict[str, torch.Tensor], path: Path) -> None:
    """Loads the reader's weights, which were read from ``path``, into the vision tower and the projector.

    Raises:
        InputError: the weights are of another model.
    """
    for part in PARTS:
        mine = {name[len(part) + 1 :]: value.float() for name, value in state.items() if name.startswith(f"{part}.")}
        try:
            getattr(model.model, part).load_state_dict(mine)
        except RuntimeError as error:
            raise InputError(f"{path} is not of this model: {str(error).splitlines()[-1].strip()}") from error


@torch.no_grad()
def _merge(language: LlamaForCausalLM, state: dict[str, torch.Tensor], path: Path) -> None:
    """Adds the low-rank updates, named as peft names them, to the language model's weights."""
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = state[name].float(), state[name.replace("lora_A", "lora_B")].float()
        try:
            language.get_submodule(module).weight += LORA_SCALE * (up @ down)
        except (AttributeError, RuntimeError) as error:
            raise InputError(f"{path} is not of this model: {module}: {error}") from error
