"""The reader: a cell of 36 x 36 pixels becomes the language model's own embedding of what stands there, and of where."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path

import torch
from common import cosine, log, set_rate, single
from torch import nn

from mixkv.document import page, render, words
from mixkv.evaluation.document_model import PARTS, READER, assemble, fill, processor, read, write
from mixkv.evaluation.loading import load

# Of the pages the first are dense with random cells; then every other one is as pages are, mostly blank.
DENSE = 2 / 3
PEAK = 1e-3


class Reader(nn.Module):
    """LLaVA's vision tower and projector, and what they are to give.

    Attributes:
        targets: the embedding of each class of cell [classes, hidden].
        place: what is added to it [SIDE * SIDE, hidden].
    """

    def __init__(self, language, tokenizer):
        super().__init__()
        model = assemble(language).float()
        self.vision_tower, self.multi_modal_projector = (getattr(model.model, part) for part in PARTS)
        self._model = [model]
        self._images = processor(tokenizer).image_processor
        ids = torch.tensor([single(tokenizer, words.as_token(name)) for name in words.CLASSES])
        embeddings = language.get_input_embeddings().weight.detach().float()
        self.targets, self.place = embeddings[ids], places(embeddings, tokenizer)

    def forward(self, pages: list[page.Page], seeds: list[str], mixed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The tower's output [pages, SIDE * SIDE, width] and the embeddings [pages, SIDE * SIDE, hidden]."""
        drawn = [render.draw(one, seed, mixed=mixed) for one, seed in zip(pages, seeds)]
        pixels = self._images(drawn, return_tensors="pt")["pixel_values"]
        with torch.autocast("cpu", torch.bfloat16):
            # What LLaVA hands its projector: the last layer's output, before the tower's last norm.
            hidden = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
            found = self.multi_modal_projector(hidden)
        return hidden.float(), found.float()

    def distance(self, found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Square distance of a page's embeddings [SIDE * SIDE, hidden] from what is wanted, in units of a token's [SIDE * SIDE]."""
        return (found - self.targets[labels] - self.place).square().sum(-1) / self.targets.square().sum(-1).mean()

    def load(self, path: Path) -> Reader:
        fill(self._model[0], read(path), path)
        return self

    def save(self, path: Path) -> None:
        state = {f"{part}.{name}": value.half() for part in PARTS for name, value in getattr(self, part).state_dict().items()}
        write(path, state)


def train(steps: int, out: Path) -> None:
    """Cells to embeddings, on pages dense with random cells and then on all kinds of page; a linear head that names the cell
    helps, and is dropped."""
    torch.manual_seed(0)
    loaded = load(None, dtype="float32")
    reader = Reader(loaded.model, loaded.tokenizer)
    width = reader.vision_tower.config.hidden_size
    # A cell's place is its row's and its column's, learned together from the first step on.
    rows, columns = nn.init.normal_(torch.empty(2, page.SIDE, width), std=0.2)
    reader.vision_tower.get_parameter("embeddings.position_embedding.weight").data = (rows[:, None] + columns).flatten(0, 1)
    head = nn.Linear(width, len(words.CLASSES))
    trained = [*reader.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    right = {True: [0, 0], False: [0, 0]}
    started = time.perf_counter()
    first = round(DENSE * steps)
    for step in range(steps):
        dense = step < first
        share = cosine(step, first, 100) if dense else cosine(step - first, steps - first, 50, first=0.5, final=0.01)
        set_rate(optimizer, PEAK * share)
        chance = random.Random(f"reader {step}")
        real = not dense and step % 2 == 1
        shown = page.make(chance.choice(list(page.KINDS)), f"reader {step}").pages[0] if real else dense_page(chance)
        hidden, found = reader([shown], [f"reader {step}"], mixed=not real and step % 3 > 0)
        labels = torch.tensor([words.INDEX[cell] for row in shown.cells for cell in row])
        text = torch.tensor([cell in words.TEXT for row in shown.cells for cell in row])
        misread = nn.functional.cross_entropy(head(hidden)[0], labels, reduction="none")
        distance = reader.distance(found[0], labels)
        weight = torch.where(text, 3.3, 0.3)
        weight = weight / weight.sum()
        optimizer.zero_grad()
        ((misread + 2 * distance) * weight).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            nearest = torch.cdist(found[0] - reader.place, reader.targets).argmin(-1) == labels
        for kind in right:
            of = text == kind
            right[kind][0] += int(nearest[of].sum())
            right[kind][1] += int(of.sum())
        if (step + 1) % 50 == 0:
            shares = [hits / max(of, 1) for hits, of in (right[True], right[False])]
            log(
                f"reader {step + 1}/{steps}: text {shares[0]:.4f} right, {distance[text].mean():.3f} away; blank {shares[1]:.4f} right",
                started,
            )
            right = {True: [0, 0], False: [0, 0]}
    reader.save(out / READER)


def dense_page(chance: random.Random) -> page.Page:
    """Random cells, of held-out words too."""
    dense = page.Page()
    for row in range(page.SIDE):
        for column in range(page.SIDE):
            kind = chance.choices(("word", "digit", "mark", "decoration", "blank"), (60, 14, 6, 8, 12))[0]
            group = {
                "word": words.WORDS,
                "digit": words.DIGITS,
                "mark": words.PUNCTUATION,
                "decoration": list(words.DECORATION),
            }
            blank = words.LINE_END if column == page.SIDE - 1 else words.BLANK
            dense.cells[row][column] = chance.choice(group[kind]) if kind in group else blank
    return dense


def places(embeddings: torch.Tensor, tokenizer) -> torch.Tensor:
    """Position embeddings of the cells, [SIDE * SIDE, hidden].

    A third of a token's norm each: a letter for four rows and a number word for four columns, as positions on screens are
    told; and waves along rows and columns, by which cells below and beside each other are found.
    """
    norm = embeddings.norm(dim=-1).mean()
    letters = [single(tokenizer, f" {letter}") for letter in "ABCDEF"]
    numbers = [single(tokenizer, f" {word}") for word in "one two three four five six".split()]
    along = torch.arange(page.SIDE)
    waves = [wave(2 * math.pi * along / period) for period in (24, 12, 6, 3) for wave in (torch.sin, torch.cos)]
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(embeddings.shape[1], 2 * len(waves), generator=generator)).Q.T
    row, column = (torch.stack(waves, -1) @ part / math.sqrt(len(waves)) for part in axes.chunk(2))
    block = along // page.BLOCK

    def unit(vectors: torch.Tensor) -> torch.Tensor:
        return vectors / vectors.norm(dim=-1, keepdim=True)

    row = unit(embeddings[letters])[block] + row
    column = unit(embeddings[numbers])[block] + column
    return norm / 3 * (row[:, None] + column[None]).flatten(0, 1)
