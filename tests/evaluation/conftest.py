"""A tiny language model, its tokenizer and a prompt."""

import pytest
from support.text_models import make_model, make_text, make_tokenizer

from mixkv.evaluation import prompts


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def ids(tokenizer):
    return prompts.encode(tokenizer, prompts.Prompt(make_text(150), "w1 w2"))
