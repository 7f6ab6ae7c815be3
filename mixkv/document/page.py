"""Pages: 24 x 24 cells of text, and facts to ask questions about, made from a seed.

A page is made in three steps: a *kind* (form, table, receipt, screen, two pages) writes words into cells and lists its facts;
free cells are decorated; `render.draw` makes the image. Layouts 0 to 2 are for training, layout 3 is held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from . import words
from .words import BLANK, DECORATION, HELD_OUT, LINE_END

# Cells on a side of a page, and pixels on a side of a cell.
SIDE = 24
CELL = 36
LAYOUTS, HELD_OUT_LAYOUT = 3, 3
# Positions on a screen are named by blocks of 4 x 4 cells: A1 to F6.
BLOCK = 4


@dataclass(frozen=True)
class Fact:
    """A fact on a page.

    Attributes:
        key: the name of the fact in questions, for example ``"City of Anna"``.
        answer: for example ``"Paris"`` or ``"4821"``.
        cells: (page, row, column) of each cell of the answer, in order; on a screen, of the control.
    """

    key: str
    answer: str
    cells: tuple[tuple[int, int, int], ...]


@dataclass
class Page:
    """Cells [24][24] (see `words.CLASSES`) and their facts; ``framed``: words are drawn as buttons."""

    cells: list[list[str]] = field(default_factory=lambda: [[BLANK] * SIDE for _ in range(SIDE)])
    facts: list[Fact] = field(default_factory=list)
    framed: bool = False

    def write(self, row: int, column: int, text: str, number: int = 0) -> tuple[tuple[int, int, int], ...]:
        """Writes each word, and each other character, into a cell; a space leaves a cell free. Returns the cells written."""
        written = []
        for part in text.split(" "):
            for piece in re.findall("[A-Za-z]+|.", part):
                if column >= SIDE or row >= SIDE or self.cells[row][column] != BLANK:
                    raise ValueError(f"{text!r} does not fit at row {row}, column {column}")
                self.cells[row][column] = piece
                written.append((number, row, column))
                column += 1
            column += 1
        return tuple(written)


@dataclass(frozen=True)
class Document:
    """One or two pages and their facts."""

    kind: str
    pages: list[Page]
    facts: list[Fact]


class Source:
    """Random words and numbers; each word is used once."""

    def __init__(self, chance: random.Random, held_out: bool):
        self.chance = chance
        self.held_out = held_out
        self._given: set[str] = set()

    def word(self, group: list[str]) -> str:
        split = [word for word in group if (word in HELD_OUT) == self.held_out]
        choices = [word for word in split or group if word not in self._given] or [w for w in group if w not in self._given]
        chosen = self.chance.choice(choices)
        self._given.add(chosen)
        return chosen

    def number(self, digits: int) -> str:
        return str(self.chance.randrange(10 ** (digits - 1), 10**digits))

    def price(self) -> str:
        return f"{self.chance.randrange(1, 60)}.{self.chance.randrange(10, 100)}"

    def value(self) -> str:
        """A word or a number, for a form."""
        kind = self.chance.randrange(6)
        if kind < 2:
            return self.word(words.NAMES)
        if kind == 2:
            return self.word(words.CITIES)
        if kind == 3:
            return f"${self.price()}"
        return self.number(self.chance.randint(2, 5))


def form(source: Source, layout: int, number: int = 0) -> Page:
    """Labels and values: one column, two columns, values at a tab; layout 3 has two columns at tabs with dotted leaders."""
    page, chance = Page(), source.chance
    columns = (0, 12) if layout in (1, 3) else (0,)
    tab = {0: None, 1: None, 2: chance.randint(8, 14), 3: 5}[layout]
    page.write(0, chance.randrange(2, 16), source.word(words.CONTROLS))
    rows = sorted(chance.sample(range(2, SIDE), chance.randint(7, 9) if len(columns) == 2 else chance.randint(12, 16)))
    for row in rows:
        indent = chance.randrange(2) if layout != 3 else 0
        for column in columns:
            label, value = source.word(words.LABELS), source.value()
            page.write(row, column + indent, f"{label}:")
            start = column + indent + 2 if tab is None else column + tab
            if layout in (2, 3):
                for between in range(column + indent + 2, start):
                    page.cells[row][between] = "dots"
            page.facts.append(Fact(label, value.lstrip("$"), _without_sign(page.write(row, start, value, number), value)))
    return page


def table(source: Source, layout: int, number: int = 0) -> Page:
    """Named rows and columns: open, with bars, with rules below the head; layout 3 has a rule after every row."""
    page, chance = Page(), source.chance
    count = chance.randint(3, 4)
    width = chance.choice((4, 5)) if count == 4 else chance.choice((4, 5, 6))
    lefts = [3 + width * index for index in range(count)]
    step = 2 if layout == 3 else chance.choice((1, 2))
    top = chance.randrange(0, 4)
    length = chance.randint(5, 8)
    heads = [source.word(words.LABELS) for _ in range(count)]
    kinds = [chance.choice(("city", "number", "number", "color")) for _ in heads]
    for left, head in zip(lefts, heads):
        page.write(top, left, head)
    for index in range(length):
        row = top + 2 + step * index
        name = source.word(words.NAMES)
        page.write(row, 0, name)
        for left, head, kind in zip(lefts, heads, kinds):
            if kind == "number":
                value = source.number(chance.randint(1, 3))
            else:
                value = chance.choice(words.COLORS) if kind == "color" else source.word(words.CITIES)
            page.facts.append(Fact(f"{head} of {name}", value, page.write(row, left, value, number)))
    last = top + 2 + step * (length - 1)
    if layout == 1:
        for row in range(top, last + 1):
            for left in lefts:
                page.cells[row][left - 1] = "bar"
    if layout >= 2:
        for row in [top + 1] if layout == 2 else range(top + 1, last + 2, 2):
            page.cells[row][: SIDE - 1] = ["rule"] * (SIDE - 1)
    return page


def receipt(source: Source, layout: int, number: int = 0) -> Page:
    """Items with counts and prices, then a total: count behind, count in front, no count; layout 3 has the count behind the price."""
    page, chance = Page(), source.chance
    left = chance.randrange(0, 4)
    at = left + chance.randint(9, 12)
    page.write(0, left + 4, source.word(words.CITIES))
    date = f"{chance.randint(1, 28)} {source.word(words.MONTHS)}"
    page.facts.append(Fact("date", date, page.write(1, left, date, number)))
    step = chance.choice((1, 1, 2))
    lines = chance.randint(6, 8 if step == 2 else 13)
    row = 3
    for _ in range(lines):
        item, price, count = source.word(words.ITEMS), source.price(), str(chance.randint(2, 9))
        page.write(row, left + (2 if layout == 1 else 0), item)
        cells = page.write(row, at, f"${price}", number)
        page.facts.append(Fact(f"price of {item}", price, cells[1:]))
        if layout != 2:
            where = {0: left + 5, 1: left, 3: at + 7}[layout]
            page.facts.append(Fact(f"number of {item}", count, page.write(row, where, count, number)))
        row += step
    if chance.random() < 0.7:
        page.cells[row][left : at + 6] = [chance.choice(("rule", "double rule"))] * (at + 6 - left)
    for label in ("Tax", "Total"):
        row += 1
        price = source.price()
        page.write(row, left, f"{label}:")
        page.facts.append(Fact(label, price, page.write(row, at, f"${price}", number)[1:]))
    return page


def screen(source: Source, layout: int, number: int = 0) -> Page:
    """Named controls anywhere, in toolbars, in columns; layout 3 has a bar above and controls anywhere. Answers are A1 to F6."""
    page, chance = Page(framed=True), source.chance
    count = chance.randint(10, 18)
    if layout == 0:
        slots = chance.sample([(row, column) for row in range(SIDE) for column in range(0, SIDE - 1, 2)], count)
    elif layout == 1:
        rows = chance.sample(range(SIDE), 3)
        slots = chance.sample([(row, column) for row in rows for column in range(chance.randrange(3), SIDE - 1, 3)], count)
    elif layout == 2:
        columns = chance.sample(range(SIDE - 1), 3)
        slots = chance.sample([(row, column) for row in range(0, SIDE, 2) for column in columns], count)
    else:
        slots = [(0, column) for column in range(1, SIDE - 1, 4)]
        slots += chance.sample([(row, column) for row in range(3, SIDE) for column in range(1, SIDE - 1, 2)], count - 6)
    for row, column in slots:
        name = source.word(words.CONTROLS)
        cells = page.write(row, column, name, number)
        page.facts.append(Fact(name, f"{'ABCDEF'[row // BLOCK]}{column // BLOCK + 1}", cells))
    return page


KINDS: dict[str, Callable[..., Page]] = {"form": form, "table": table, "receipt": receipt, "screen": screen}
NAMES = (*KINDS, "two pages")


def make(kind: str, seed: int | str, *, layout: int | None = None, held_out_words: bool = False) -> Document:
    """A document of a kind, the same for the same arguments.

    Args:
        layout: 0 to 2, or 3, which is held out of training; None: random from 0 to 2.
        held_out_words: whether names, cities, items and controls are those held out of training.

    Raises:
        ValueError: unknown kind or layout.
    """
    if kind not in NAMES:
        raise ValueError(f"kind must be one of {', '.join(NAMES)}, not {kind!r}")
    if layout is not None and not 0 <= layout <= HELD_OUT_LAYOUT:
        raise ValueError(f"layout must be from 0 to {HELD_OUT_LAYOUT}, not {layout}")
    chance = random.Random(f"{kind} {seed}")
    chosen = chance.randrange(LAYOUTS) if layout is None else layout
    if kind != "two pages":
        page = KINDS[kind](Source(chance, held_out_words), chosen)
        pages, facts = [page], list(page.facts)
    else:
        # Both pages have the same labels, so that the page matters.
        pages = [form(Source(random.Random(f"{seed} {i}"), held_out_words), chosen, i) for i in range(2)]
        facts = [Fact(f"{f.key} on page {i + 1}", f.answer, f.cells) for i, page in enumerate(pages) for f in page.facts]
    for page in pages:
        _decorate(page, chance)
    return Document(kind, pages, facts)


def _without_sign(cells: tuple, value: str) -> tuple:
    return cells[1:] if value.startswith("$") else cells


def _decorate(page: Page, chance: random.Random) -> None:
    """Adds rules, textures and logos in free cells away from the text, then line ends."""
    for _ in range(chance.randrange(0, 4)):
        free = [row for row in range(SIDE) if all(cell == BLANK for cell in page.cells[row])]
        if free:
            row, start = chance.choice(free), chance.randrange(SIDE // 2)
            end = chance.randrange(start + 3, SIDE)
            page.cells[row][start:end] = [chance.choice(list(DECORATION))] * (end - start)
    for _ in range(chance.randrange(0, 12)):
        row, column = chance.randrange(SIDE), chance.randrange(SIDE)
        around = page.cells[row][max(column - 2, 0) : column + 3]
        if all(cell == BLANK for cell in around):
            page.cells[row][column] = chance.choice(list(DECORATION))
    for line in page.cells:
        if line[-1] == BLANK:
            line[-1] = LINE_END
