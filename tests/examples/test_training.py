"""The parts of the document model's training that can be wrong without anybody seeing it."""

import importlib
import random
from pathlib import Path

import pytest
import torch

from mixkv.document import page, questions
from mixkv.evaluation import loading

FOLDER = Path(__file__).parents[2] / "examples" / "document_vlm"


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("asked")


@pytest.mark.parametrize("common, rest, heads, shared", [(7, 5, 6, 2), (1, 9, 4, 4), (20, 1, 3, 1)])
def test_attention_equals_torchs(asked, common, rest, heads, shared):
    torch.manual_seed(common)
    length = common + rest
    states = [torch.randn(2, count, length, 8, requires_grad=True) for count in (heads, shared, shared)]
    question = torch.cat([torch.zeros(common), 1 + torch.arange(rest) // 2]).long()
    empty = torch.empty(0, dtype=torch.long)
    mask = asked.Asked(empty, empty, empty, question, empty).mask(torch.float32)
    found, _ = asked.attend(None, *states, mask, 0.3, common)
    wanted = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=0.3, enable_gqa=True)
    wanted = wanted.transpose(1, 2)
    assert torch.allclose(found, wanted, atol=1e-6)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((output * weight).sum(), states) for output in (found, wanted)]
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(*gradients))


@pytest.mark.usefixtures("needs_smollm2")
@pytest.mark.parametrize("kind, bare", [("form", False), ("form", True), ("two pages", True)])
def test_a_question_sees_the_pages_and_itself(asked, kind, bare):
    tokenizer = loading.load(None, device="cpu").tokenizer
    document = page.make(kind, "seen")
    found = asked.ask(tokenizer, document, random.Random(0), bare)
    seen = found.mask(torch.float32)[0, 0] == 0
    common = int((found.question == 0).sum())
    cells = len(document.pages) * page.SIDE**2
    places = found.image[found.image >= 0]
    assert (len(places) < cells) == bare and torch.equal(places, places.unique())
    first = len(tokenizer(questions.USER)["input_ids"])
    assert torch.equal(found.positions[first:common], first + places)
    for number in range(1, asked.QUESTIONS + 1):
        rows = (found.question == number).nonzero()[:, 0]
        assert torch.equal(found.positions[rows], first + cells + torch.arange(len(rows)))
        for turn, row in enumerate(rows.tolist()):
            assert seen[row].nonzero()[:, 0].tolist() == [*range(common), *rows[: turn + 1].tolist()]
        labels = found.labels[rows]
        answer = tokenizer.decode(labels[labels >= 0])
        assert answer.startswith(" ") and answer.endswith(questions.END.strip())
        facts = {fact.answer for fact in document.facts}
        assert set(answer.removesuffix(questions.END.strip()).strip().split(", ")) <= facts
