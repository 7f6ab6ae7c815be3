"""Which tokens of a text contain the answer."""

import pytest

from mixkv.evaluation import loading, spans, tasks


@pytest.fixture(scope="module")
def small_lm(needs_smollm2):
    return loading.load(None)


@pytest.mark.parametrize("kind", spans.KINDS)
def test_every_token_of_an_answer_is_shown_by_the_same_characters_of_the_text(small_lm, kind):
    for seed in range(4):
        aligned = spans.align(small_lm, kind, 300, seed)
        ids = aligned.inputs["input_ids"][0]
        sample = tasks.TASKS[kind](small_lm.tokenizer, 300, seed)
        answer = sample.expected[seed % len(sample.expected)]
        targets = aligned.targets
        assert small_lm.tokenizer.decode([target.token for target in targets]).strip() == answer
        assert [target.position for target in targets] == list(range(len(ids) - len(targets), len(ids)))
        positions = sorted({position for target in targets for position in target.shown})
        assert positions == list(range(positions[0], positions[-1] + 1)) and positions[-1] < targets[0].position
        assert answer in small_lm.tokenizer.decode(ids[positions])
        fact = small_lm.tokenizer.decode(ids[max(positions[0] - 8, 0) : positions[-1] + 1]).rstrip("., ")
        said = small_lm.tokenizer.decode(ids[targets[0].position - 2 :])
        assert fact.endswith(said.strip())
        for target in targets:
            assert small_lm.tokenizer.decode([target.token]).strip() in small_lm.tokenizer.decode(ids[list(target.shown)])
