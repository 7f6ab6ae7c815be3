"""The document model's pages: what is on them, how they are drawn, asked about and read by its processor."""

import random

import numpy
import pytest
import torch

from mixkv.document import page, questions, render, words


@pytest.mark.parametrize("kind", page.NAMES)
@pytest.mark.parametrize("layout", range(4))
def test_the_cells_of_a_fact_hold_its_answer(kind, layout):
    for seed in range(20):
        document = page.make(kind, seed, layout=layout)
        assert len(document.pages) == (2 if kind == "two pages" else 1)
        assert len({fact.key for fact in document.facts}) == len(document.facts)
        for fact in document.facts:
            shown = [document.pages[number].cells[row][column] for number, row, column in fact.cells]
            if kind == "screen":
                _, row, column = fact.cells[0]
                assert shown == [fact.key] and fact.answer == f"{'ABCDEF'[row // 4]}{column // 4 + 1}"
            else:
                assert "".join(shown) == fact.answer.replace(" ", "")


@pytest.mark.parametrize("kind", page.NAMES)
def test_held_out_words_are_kept_apart(kind):
    held_out_groups = {word for group in (words.NAMES, words.CITIES, words.ITEMS, words.CONTROLS) for word in group}
    for seed in range(20):
        seen = {cell for one in page.make(kind, seed).pages for row in one.cells for cell in row}
        assert not seen & words.HELD_OUT
        fresh = {cell for one in page.make(kind, seed, held_out_words=True).pages for row in one.cells for cell in row}
        # Where a page needs more words than are held out, others fill in.
        assert fresh & words.HELD_OUT or not fresh & held_out_groups


def test_pages_come_from_their_seed_alone():
    assert page.make("table", 3) == page.make("table", 3) != page.make("table", 4)
    one = page.make("receipt", 5).pages[0]
    same = [numpy.asarray(render.draw(one, 1)) for _ in range(2)]
    assert (same[0] == same[1]).all() and same[0].shape == (864, 864, 3)
    assert (same[0] != numpy.asarray(render.draw(one, 2))).any()


def test_ink_is_where_the_words_are():
    document = page.make("screen", 2)
    image = numpy.asarray(render.draw(document.pages[0], 2)).astype(float).mean(-1)
    cells = image.reshape(page.SIDE, page.CELL, page.SIDE, page.CELL).transpose(0, 2, 1, 3).reshape(page.SIDE, page.SIDE, -1)
    spread = numpy.quantile(cells, 0.99, axis=-1) - numpy.quantile(cells, 0.01, axis=-1)
    shown = numpy.array([[cell in words.TEXT for cell in row] for row in document.pages[0].cells])
    blank = numpy.array([[cell in (words.BLANK, words.LINE_END) for cell in row] for row in document.pages[0].cells])
    assert spread[shown].min() > spread[blank].max()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: page.make("letter", 0), "kind must be one of form, table, receipt, screen, two pages, not 'letter'"),
        (lambda: page.make("form", 0, layout=7), "layout must be from 0 to 3, not 7"),
        (lambda: render.draw(page.Page(), 0, font="Papyrus"), "font must be one of .*cmr10, not 'Papyrus'"),
        (lambda: page.Page().write(0, 23, "Name :"), "'Name :' does not fit at row 0, column"),
    ],
)
def test_what_cannot_be_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_questions():
    document = page.make("form", 1)
    facts = document.facts[:3]
    assert questions.ask(document, facts) == "What is the {}, {} and {}?".format(*(fact.key for fact in facts))
    assert questions.ask(document, facts[:1], "held out") == f"Please read the {facts[0].key} to me."
    assert questions.answer(facts) == ", ".join(fact.answer for fact in facts)
    drawn = questions.draw_facts(page.make("table", 1), random.Random(0), 4)
    assert len({fact.key for fact in drawn}) == len(drawn) > 0


@pytest.fixture(scope="module")
def tokenizer(needs_smollm2):
    from mixkv.evaluation import loading

    return loading.load(None).tokenizer


def test_a_cell_is_one_token(tokenizer):
    assert {len(tokenizer(words.as_token(name))["input_ids"]) for name in words.CLASSES} == {1}
    assert len({words.as_token(name) for name in words.CLASSES}) == len(words.CLASSES)


def test_the_processor_lays_out_what_was_trained(tokenizer):
    from mixkv.evaluation.document_model import MEAN, STD, processor

    made = processor(tokenizer)
    image = render.draw(page.make("form", 1).pages[0], 1)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the Name?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Anna"}]},
        {"role": "user", "content": "Give the City."},
    ]
    inputs = made(images=image, text=made.apply_chat_template(turns, add_generation_prompt=True), return_tensors="pt")
    patches = questions.IMAGE_TOKEN * page.SIDE**2
    text = (
        f"{questions.USER}{patches}What is the Name?{questions.END}{questions.ASSISTANT} Anna{questions.END}"
        f"{questions.USER}Give the City.{questions.END}{questions.ASSISTANT}"
    )
    assert inputs["input_ids"][0].tolist() == tokenizer(text)["input_ids"]
    plain = torch.tensor(numpy.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(inputs["pixel_values"][0], (plain - MEAN) / STD, atol=1e-6, rtol=0)
