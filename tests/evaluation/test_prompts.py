"""Prompts that mixkv contains, and filler."""

import pytest

from mixkv.evaluation import prompts


@pytest.mark.parametrize("count", [5, 700])
def test_filler_has_the_length_asked_for(tokenizer, count):
    assert prompts.filler(tokenizer, count, batch=3).shape == (3, count)


def test_the_demo_text_is_whole():
    prompt = prompts.demo()
    assert 7000 < len(prompt.text) < 9000
    before, after = prompt.text.split("By the way, the secret ingredient of grandmother's soup is a spoonful of honey.")
    assert min(len(before), len(after)) > 2000
