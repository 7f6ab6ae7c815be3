"""A slider for the budget: the text or the page that a cache keeps, and the answer that it gives, in a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..cache import MixKVCache
from ..hf.versions import cache_argument
from .patches import kept_patches
from .share import strength
from .text import EVICTED_TEXT, shares

if TYPE_CHECKING:
    from ipywidgets import VBox
    from PIL.Image import Image
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

BUDGETS = (40, 48, 64, 96, 128, 192, 256)
# Of `text.kept`'s colour for what all heads keep.
_SHADE = "74, 152, 201"


class View(NamedTuple):
    """What one budget leaves of a prompt: the picture, as HTML, the bytes of the cache and the answer."""

    budget: int | None  # None: the full cache
    picture: str
    nbytes: int
    answer: str


def explore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Mapping[str, torch.Tensor] | BatchEncoding,
    *,
    image: Image | Sequence[Image] | None = None,
    budgets: Sequence[int] = BUDGETS,
    max_new_tokens: int = 20,
    **options: Any,
) -> VBox:
    """A slider for the budget, and below it what is kept of the prompt and the model's answer with that cache.

    The model reads the prompt and answers once for each budget before the slider is shown. Moving the slider computes
    nothing, so that it also works in a notebook that was exported to HTML.

    Example:
        >>> mixkv.plot.explore(model, tokenizer, "A long text and a question", method="snapkv")

    Args:
        model: the model that reads the prompt.
        tokenizer: of the model.
        prompt: a text, or what the tokenizer or processor returned for one prompt: input_ids [1, N], pixel_values and the like.
        image: the PIL image that went to the processor (a list, if there are several: the first is drawn); the page is shown in
            place of the text.
        budgets: positions of the slider, each a ``budget`` of `MixKVConfig` in entries per KV head. Those of N or more are left
            out. The last position is the full cache.
        max_new_tokens: the longest answer.
        options: of `MixKVConfig`, such as method and score.

    Returns: the widget.

    Raises:
        ImportError: ipywidgets is not installed, or with ``image`` matplotlib.
        ValueError: a prompt of several rows.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("explore needs ipywidgets: pip install 'mixkv[notebook]'") from error

    found = views(model, tokenizer, prompt, image=image, budgets=budgets, max_new_tokens=max_new_tokens, **options)
    full = found[-1].nbytes
    names = [f"{view.budget or 'all'}" for view in found]
    slider = ipywidgets.SelectionSlider(
        options=names, value=names[len(names) // 2], description="budget", continuous_update=True
    )
    pages = [ipywidgets.HTML(_page(view, full)) for view in found]
    stack = ipywidgets.Stack(pages, selected_index=slider.index)
    # Linked in the browser: no kernel is needed.
    box = ipywidgets.VBox([slider, stack])
    box.link = ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    return box


@torch.no_grad()
def views(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Mapping[str, torch.Tensor] | BatchEncoding,
    *,
    image: Image | Sequence[Image] | None = None,
    budgets: Sequence[int] = BUDGETS,
    max_new_tokens: int = 20,
    **options: Any,
) -> list[View]:
    """What `explore` shows, in the order of the slider. Args and errors as there."""
    given = tokenizer(prompt, return_tensors="pt") if isinstance(prompt, str) else prompt
    inputs = {name: value.to(model.device) for name, value in given.items()}
    batch, length = inputs["input_ids"].shape
    if batch != 1:
        raise ValueError(f"prompt has {batch} rows of input_ids: give one")
    found = []
    for budget in [*(budget for budget in sorted(budgets) if budget < length), None]:
        # A budget of 1.0, the whole prompt, is valid for a prompt of any length.
        cache = MixKVCache(model, **{**options, "budget": 1.0 if budget is None else budget})
        tokens = model.generate(**inputs, **cache_argument(cache), do_sample=False, max_new_tokens=max_new_tokens)
        answer = tokenizer.decode(tokens[0, length:], skip_special_tokens=True).strip()
        if image is None:
            picture = text_html(tokenizer, inputs["input_ids"][0].tolist(), shares(cache, length).tolist())
        else:
            picture = _image_html(cache, image, inputs, model.config)
        found.append(View(budget, picture, cache.stats()["bytes_full" if budget is None else "bytes"], answer))
    return found


def text_html(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kept_by: Sequence[float]) -> str:
    """The tokens as HTML, shaded as `mixkv.plot.kept` does: darker, the larger the share of KV heads that keep a token.

    Args:
        ids: N tokens.
        kept_by: the share of each, from 0 to 1.
    """
    parts, start = [], 0
    shades = [round(strength(share), 2) for share in kept_by]
    for end in range(1, len(ids) + 1):
        if end < len(ids) and shades[end] == shades[start]:
            continue
        text = html.escape("".join(tokenizer.decode([token]) for token in ids[start:end]))
        style = f"background:rgba({_SHADE},{shades[start]});color:black" if shades[start] else f"color:{EVICTED_TEXT}"
        parts.append(f'<span style="{style}">{text}</span>')
        start = end
    font = "white-space:pre-wrap;font-family:monospace;font-size:12px;line-height:1.35;background:white;padding:6px"
    return f'<div style="{font}">{"".join(parts)}</div>'


def _image_html(cache: MixKVCache, image, inputs: Mapping[str, torch.Tensor], config) -> str:
    import base64

    from .canvas import import_pyplot

    ax = kept_patches(cache, image, inputs, config)
    file = io.BytesIO()
    ax.figure.savefig(file, format="jpeg", dpi=90, pil_kwargs={"quality": 70})
    import_pyplot().close(ax.figure)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _page(view: View, full: int) -> str:
    """One position of the slider as HTML."""
    budget = "full cache" if view.budget is None else f"{view.budget} entries per KV head"
    head = f"{budget}: {view.nbytes / 2**20:.2f} MiB ({view.nbytes / full:.0%})"
    return f"<b>{head}</b><br>answer: <b>{html.escape(view.answer)}</b>{view.picture}"
