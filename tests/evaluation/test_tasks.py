"""Tasks made from seeds, and samples from a file."""

import json

import pytest
from support.text_models import make_text, make_tokenizer

from mixkv.evaluation import InputError, loading, tasks


@pytest.fixture(scope="module")
def real_tokenizer(needs_smollm2):
    return loading.load(None, device="cpu").tokenizer


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("tokens", [400, 1000])
def test_tasks(real_tokenizer, task, tokens):
    for seed in range(12):
        sample = tasks.TASKS[task](real_tokenizer, tokens, seed)
        assert sample == tasks.TASKS[task](real_tokenizer, tokens, seed)
        longest = len(sample.context) + max(map(len, sample.follow))
        assert tokens - 40 <= longest <= tokens + 12
        context = real_tokenizer.decode(sample.context)
        assert all(sample.follow)
        if task == "prose":
            assert [len(answer) for answer in sample.answer] == [32] and sample.expected is None
            continue
        assert all(expected in context for expected in sample.expected)
        assert len(sample.expected) == len(sample.follow) == (4 if task == "several" else 1)
    assert tasks.TASKS[task](real_tokenizer, tokens, 0) != tasks.TASKS[task](real_tokenizer, tokens, 2)


def test_needles_go_through_all_depths(real_tokenizer):
    places = []
    for seed in range(0, 10, 2):
        sample = tasks.needle(real_tokenizer, 600, seed)
        text = real_tokenizer.decode(sample.context)
        places.append((sample.depth, text.index("The code of the") / len(text)))
    assert [depth for depth, _ in places] == [0, 0.25, 0.5, 0.75, 1]
    assert all(abs(depth - place) < 0.15 for depth, place in places)


def test_halves_share_no_prose():
    assert not set(tasks._manual(0).split("\n\n")) >= set(tasks._manual(1).split("\n\n"))
    assert tasks._manual(0) == tasks._manual(2) and len(tasks._manual(0)) > 100_000 < len(tasks._manual(1))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"context": "w1"}', "line 2 has no 'answer'"),
        ('{"answer": "w1"}', "line 2 has no 'context'"),
        ('{"context": "w1", "question": ["w2"], "answer": "w3"}', "line 2 must have"),
        ('{"context": "w1", "question": ["w2", "w3"], "answer": ["w3"]}', "line 2 must have"),
        ('{"context": 3, "answer": "w3"}', "line 2 must have"),
        ('{"context": " ", "answer": "w3"}', "line 2 must have"),
    ],
)
def test_broken_data_is_told_by_line(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"context": make_text(60), "answer": "w1"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=message):
        tasks.from_file(make_tokenizer(), str(path))
