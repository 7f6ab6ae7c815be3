"""Pages as images: 864 x 864 pixels, 36 x 36 per cell, in fonts that matplotlib ships."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont

from .page import CELL, SIDE, Page
from .words import BLANK, DECORATION, LINE_END

FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSansMono DejaVuSansMono-Bold STIXGeneral "
    "STIXGeneralBol cmss10"
).split()
HELD_OUT_FONT = "cmr10"
# Font sizes in points. Words wider than a cell get a smaller font, then are narrowed.
SIZES = (10, 11, 12, 13)
SMALLEST = 9


def draw(page: Page, seed: int | str, *, font: str | None = None, mixed: bool = False) -> Image.Image:
    """The page as an RGB image, with random paper, ink, font size, noise and, unless given, font.

    Args:
        seed: the same arguments give the same image.
        mixed: whether every cell has a random font and size, and some a frame.

    Raises:
        ValueError: unknown font.
    """
    if font is not None and font not in (*FONTS, HELD_OUT_FONT):
        raise ValueError(f"font must be one of {', '.join((*FONTS, HELD_OUT_FONT))}, not {font!r}")
    chance = random.Random(f"draw {seed}")
    face = font or chance.choice(FONTS)
    size = chance.choice(SIZES)
    marks: list[list[numpy.ndarray | None]] = [[None] * SIDE for _ in range(SIDE)]
    for row, line in enumerate(page.cells):
        for column, cell in enumerate(line):
            if mixed:
                face, size = chance.choice(FONTS), chance.choice(SIZES)
            framed = page.framed or mixed and chance.random() < 0.1
            marks[row][column] = _mark(cell, face, size, framed, chance)
    return _print(marks, chance, seed)


def _print(marks: list[list[numpy.ndarray | None]], chance: random.Random, seed: int | str) -> Image.Image:
    """Ink on paper, with noise. Each mark is the amount of ink [CELL, CELL] in [0, 1], or None."""
    noise = numpy.random.default_rng(random.Random(f"noise {seed}").getrandbits(64))
    paper = numpy.array([chance.randint(215, 255) for _ in range(3)], dtype=numpy.float32)
    ink = numpy.array([chance.randint(0, 80) for _ in range(3)], dtype=numpy.float32)
    coverage = numpy.zeros((SIDE * CELL, SIDE * CELL), dtype=numpy.float32)
    for row, line in enumerate(marks):
        for column, mark in enumerate(line):
            if mark is not None:
                coverage[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = mark
    # Uneven light.
    slope = numpy.linspace(-1, 1, SIDE * CELL, dtype=numpy.float32) * chance.uniform(-8, 8)
    image = paper + coverage[..., None] * (ink - paper) + slope[:, None, None]
    grain = noise.standard_normal((SIDE * CELL, SIDE * CELL), dtype=numpy.float32) * chance.uniform(0, 10)
    return Image.fromarray(numpy.clip(image + grain[..., None], 0, 255).astype(numpy.uint8))


def _mark(cell: str, font: str, size: int, framed: bool, chance: random.Random) -> numpy.ndarray | None:
    if cell in (BLANK, LINE_END):
        return None
    if cell in DECORATION:
        return _decoration(cell, chance.randrange(1, 3), chance.randrange(6, CELL - 6)) * chance.uniform(0.3, 0.8)
    glyphs = _glyphs(cell, font, size if len(cell) > 1 else size + 4)
    glyphs = numpy.roll(glyphs, (chance.randint(-1, 1), chance.randint(-1, 1)), (0, 1))
    return numpy.maximum(glyphs, _frame()) if framed else glyphs


@lru_cache(maxsize=40_000)
def _glyphs(text: str, font: str, size: int) -> numpy.ndarray:
    """A word or character, centered in a cell."""
    room = CELL - 4
    face = _font(font, size)
    while size > SMALLEST and face.getlength(text) > room:
        size -= 1
        face = _font(font, size)
    width = max(room, round(face.getlength(text)) + 2)
    image = Image.new("L", (width, CELL))
    ImageDraw.Draw(image).text((width / 2, CELL / 2), text, fill=255, font=face, anchor="mm")
    cell = Image.new("L", (CELL, CELL))
    cell.paste(image.resize((room, CELL), Image.Resampling.BILINEAR), ((CELL - room) // 2, 0))
    return numpy.asarray(cell, dtype=numpy.float32) / 255


@lru_cache(maxsize=1)
def _frame() -> numpy.ndarray:
    """The frame of a button."""
    image = Image.new("L", (CELL, CELL))
    ImageDraw.Draw(image).rounded_rectangle((0, 4, CELL - 1, CELL - 5), radius=5, outline=130)
    return numpy.asarray(image, dtype=numpy.float32) / 255


@lru_cache(maxsize=400)
def _decoration(kind: str, thick: int, at: int) -> numpy.ndarray:
    image = Image.new("L", (CELL, CELL))
    pen = ImageDraw.Draw(image)
    if kind in ("rule", "double rule"):
        pen.line((0, at, CELL, at), fill=255, width=thick)
        if kind == "double rule":
            pen.line((0, at + 4, CELL, at + 4), fill=255, width=thick)
    elif kind == "bar":
        pen.line((at, 0, at, CELL), fill=255, width=thick)
    elif kind == "dots":
        for x in range(4, CELL, 8):
            pen.ellipse((x, at, x + thick, at + thick), fill=255)
    elif kind == "hatch":
        for x in range(-CELL, CELL, 6 + thick):
            pen.line((x, CELL, x + CELL, 0), fill=255)
    elif kind == "logo":
        pen.ellipse((6, 6, CELL - 6, CELL - 6), fill=255)
        pen.ellipse((at // 2 + 4, 12, at // 2 + 12, 20), fill=0)
    else:
        points = [(x, at + (4 if x // 6 % 2 else -4)) for x in range(0, CELL + 6, 6)]
        pen.line(points, fill=255, width=thick)
    return numpy.asarray(image, dtype=numpy.float32) / 255


@lru_cache(maxsize=200)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)
