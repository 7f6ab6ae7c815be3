"""Which tokens of an answer, and which image tokens, belong to a box."""

from types import SimpleNamespace

import pytest
import transformers
from support import zoo, zoo_processors
from support.asked_pages import load

from mixkv.evaluation import InputError, boxes, loading
from mixkv.evaluation.boxes import Asked, Box


def test_tokens_and_boxes_meet_character_by_character():
    loaded = load("llava")
    image = zoo_processors.picture(12, 12)
    corner, middle, wide = (0, 0, 4, 4), (4, 4, 8, 8), (5, 0, 7, 12)
    asked = Asked([image], "w5", "w10 w20 w30 w40", [Box(0, 2, 0, *corner), Box(2, 3, 0, *middle), Box(5, 10, 0, *wide)])
    aligned = boxes.align(loaded, asked)
    ids = aligned.inputs["input_ids"][0].tolist()
    first, end = ids.index(zoo.IMAGE), len(ids)
    assert [(target.position, target.token) for target in aligned.targets] == [(end - 4, 10), (end - 3, 20), (end - 2, 30)]
    row = tuple(first + place for place in (3, 4, 5))
    assert [target.shown for target in aligned.targets] == [(first, first + 4), row, row]


def test_what_the_processor_cuts_off_is_no_target():
    loaded = load("llava")
    asked = Asked([zoo_processors.picture(12, 36)], "w5", "w10 w20", [Box(0, 3, 0, 0, 0, 4, 4), Box(4, 7, 0, 0, 16, 4, 20)])
    assert [target.token for target in boxes.align(loaded, asked).targets] == [20]


@pytest.fixture(scope="module")
def reader(needs_smollm2):
    """The document model's processor and config; no weights are needed."""
    from mixkv.evaluation import document_model as model

    tokenizer = loading.load(None).tokenizer
    stand_in = SimpleNamespace(config=model.config(transformers.LlamaConfig(), 6))
    return loading.Loaded(stand_in, tokenizer, "document", model.processor(tokenizer), knows_pages=True)


@pytest.mark.parametrize("kind", boxes.KINDS)
def test_every_token_of_an_answer_is_shown_by_its_cell(reader, kind):
    from mixkv.document import page, questions

    tokenizer = reader.tokenizer
    for seed in range(2):
        asked = boxes.make(kind, seed, terse=False)
        aligned = boxes.align(reader, asked)
        ids = aligned.inputs["input_ids"][0].tolist()
        first = ids.index(6)
        pages = page.make(boxes.KINDS[kind], f"boxed {seed}").pages
        cells = [cell for one in pages for row in one.cells for cell in row]
        shown = [cells[column - first] for target in aligned.targets for column in target.shown]
        assert shown == [tokenizer.decode([target.token]).strip() for target in aligned.targets]
        assert "".join(shown) == asked.answer.replace(", ", "").replace(" ", "")
        assert [ids[target.position] for target in aligned.targets] == [target.token for target in aligned.targets]
        text = tokenizer.decode(ids[ids.index(6) + len(cells) :])
        assert text == f"{asked.question}{questions.END}{questions.ASSISTANT} {asked.answer}"


def test_models_and_images_that_cannot_be_judged():
    one = Asked([zoo_processors.picture(24, 24)], "w5", "w10", [Box(0, 3, 0, 0, 0, 4, 4)])
    with pytest.raises(InputError, match="the prompt of mllama has no image tokens: .* cross-attention"):
        boxes.align(load("mllama"), one)
    for name in ("qwen2_vl", "internvl"):
        small = Asked([zoo_processors.picture(24, 3)], "w5", "w10", [Box(0, 3, 0, 0, 0, 1, 1)])
        with pytest.raises(InputError, match="an image of 24 x 3 pixels is smaller than one patch of .*, 4 x 4: give a larger"):
            boxes.align(load(name), small)
    narrow = Asked([zoo_processors.picture(4, 1000)], "w5", "w10", [Box(0, 3, 0, 0, 0, 1, 1)])
    with pytest.raises(InputError, match="Qwen2VLProcessor cannot read images of 4 x 1000 pixels: .*aspect ratio"):
        boxes.align(load("qwen2_vl"), narrow)
    two = Asked([zoo_processors.picture(24, 24)] * 2, "w5", "w10", [Box(0, 3, 1, 0, 0, 4, 4)])
    with pytest.raises(InputError, match="use one image per prompt"):
        boxes.align(load("internvl"), two)
