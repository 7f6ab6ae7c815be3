"""Documents that are read once and asked about later: texts, PDF files and page images, and their caches as files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from ..cache import MixKVCache
from ..cache.save import read as read_saved
from ..config import MixKVConfig
from ..hf.versions import cache_argument
from ..read import read
from . import InputError, loading
from .loaded import Loaded
from .packages import require
from .prompts import adds_special_tokens, check_length

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# Stands for the question in a chat template.
_QUESTION = "\u2047question\u2047"


@dataclass
class Document:
    """What the files of a document hold: text, and page images (PIL) before it."""

    text: str = ""
    images: list = field(default_factory=list)

    @classmethod
    def of(cls, files: Sequence[str]) -> Document:
        """The contents of ``files``: PDF text, images by their suffix, all others UTF-8 text.

        Raises:
            InputError: a file is missing, empty or of another kind, or a package is missing.
        """
        texts, images = [], []
        for name in files:
            path = Path(name)
            if not path.is_file():
                raise InputError(f"{name} cannot be read: there is no such file")
            if path.suffix.lower() in IMAGES:
                images.append(_image(path))
                continue
            text = (_pdf_text(path) if path.suffix.lower() == ".pdf" else _text(path)).strip()
            if not text:
                raise InputError(f"{name} has no text: give page images of it to a vision-language model (--model)")
            texts.append(text)
        return cls("\n\n".join(texts), images)


@dataclass(frozen=True)
class Kept:
    """A document as a compressed cache, and what is needed to ask about it.

    Attributes:
        cache: as the document left it, compressed or full; questions go on from copies.
        ids: [1, N], the document's token ids.
        end: what follows a question, by the model's chat template.
        loaded: the model.
    """

    cache: Cache
    ids: torch.Tensor
    end: str
    loaded: Loaded

    @torch.no_grad()
    def ask(self, question: str, *, max_new_tokens: int = 64, **options: Any) -> str:
        """The answer to a question about the document. ``options``: further ones of ``generate``.

        Raises:
            InputError: document, question and answer exceed the model's context.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        follow = tokenizer(f"\n\n{question}{self.end}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([self.ids, follow], dim=1).to(model.device)
        check_length(model, ids.shape[1], max_new_tokens)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, **options, **cache_argument(copy.deepcopy(self.cache)))
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def save(self, path: str, model: str | None) -> None:
        """Saves it for `load`; ``model``: what `loading.load` was given.

        Raises:
            InputError: the file cannot be written.
        """
        if not isinstance(self.cache, MixKVCache):
            raise InputError("a full cache is not saved: keep the document by a config")
        about = {"model": model, "vision": self.loaded.processor is not None, "ids": self.ids[0].tolist(), "end": self.end}
        try:
            self.cache.save(path, about={"document": about})
        except OSError as error:
            raise InputError(f"--out {path} cannot be written: {error.strerror or error}") from error


def keep(
    loaded: Loaded, document: Document, config: MixKVConfig | None, *, chat: bool = True, progress: bool | None = None
) -> Kept:
    """Reads a document as the beginning of a user's turn, and compresses it.

    Args:
        config: how; None: into the full cache of transformers.
        chat: whether to use the model's chat template, if it has one.
        progress: as in `mixkv.read`.

    Raises:
        InputError: page images and no vision-language model, or the document exceeds the model's context.
    """
    if document.images and loaded.processor is None:
        raise InputError(f"{loaded.name} reads no images: give a vision-language model with --model")
    start, end = _turn(loaded, document, chat)
    inputs = dict(_encode(loaded, document, start))
    ids = inputs["input_ids"]
    check_length(loaded.model, ids.shape[1], 1)
    inputs = {name: value.to(loaded.model.device) for name, value in inputs.items()}
    if config is None:
        full = DynamicCache(config=loaded.model.config)
        loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False, **cache_argument(full))
        return Kept(full, ids, end, loaded)
    try:
        cache = read(loaded.model, **inputs, config=config, progress=progress)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Kept(cache, ids, end, loaded)


def load(path: str, model: str | None = None, *, device: str | None = None) -> Kept:
    """A document that `Kept.save` wrote, with its model.

    Args:
        model: in place of the saved name, for instance a folder of this machine.

    Raises:
        InputError: the file cannot be read or holds no document, or the model cannot be loaded or is another.
    """
    try:
        saved = read_saved(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error
    about = saved.header.get("about", {}).get("document")
    if about is None:
        raise InputError(f"{path} holds a cache, but no document to ask about: mixkv read FILE --out {path} makes one")
    loaded = loading.load(model or about["model"], dtype=saved.header["dtype"], device=device, vision=about["vision"])
    try:
        cache = MixKVCache.load(path, loaded.model)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Kept(cache, torch.tensor([about["ids"]]), about["end"], loaded)


def _turn(loaded: Loaded, document: Document, chat: bool) -> tuple[str, str]:
    """What comes before a question of a user's turn, the document included, and what comes after it."""
    reader = loaded.processor or loaded.tokenizer
    if not chat or not getattr(reader, "chat_template", None):
        return document.text, ""
    content: Any = f"{document.text}{_QUESTION}"
    if loaded.processor is not None:
        content = [*({"type": "image"} for _ in document.images), {"type": "text", "text": content}]
    whole = reader.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    start, _, end = whole.partition(_QUESTION)
    return start, end


def _encode(loaded: Loaded, document: Document, start: str) -> dict[str, torch.Tensor]:
    special = adds_special_tokens(loaded.tokenizer, start)
    if loaded.processor is None:
        return loaded.tokenizer(start, add_special_tokens=special, return_tensors="pt")
    images = {"images": document.images} if document.images else {}
    return loaded.processor(text=start, add_special_tokens=special, return_tensors="pt", **images)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is neither UTF-8 text (byte {error.start}) nor a PDF file or an image by its name: convert it, e.g. with "
            f"iconv -t UTF-8"
        ) from error


def _pdf_text(path: Path) -> str:
    require("pypdf", remedy="pip install pypdf")
    import pypdf

    try:
        pages = pypdf.PdfReader(path).pages
        return "\n\n".join(page.extract_text() for page in pages)
    except pypdf.errors.PyPdfError as error:
        raise InputError(f"{path} is no PDF file that can be read ({error})") from error


def _image(path: Path):
    require("PIL", remedy="pip install pillow")
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image that can be read") from error
