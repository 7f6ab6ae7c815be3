"""The results file: continued after an interruption, and shared by several processes."""

import pytest

from mixkv.evaluation import InputError, journal, spread


def test_journal_takes_up_where_it_stopped(tmp_path):
    path, header = tmp_path / "out.jsonl", {"model": "m", "configs": [1], "machine": "a"}
    book = journal.Journal(str(path), header, resume=False)
    for seed in range(3):
        book.add({"task": "t", "tokens": 5, "seed": seed})
    with pytest.raises(InputError, match="exists"):
        journal.Journal(str(path), header, resume=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    again = journal.Journal(str(path), {**header, "machine": "b"}, resume=True)
    assert [record["seed"] for record in again.records] == [0, 1]
    again.add({"task": "t", "tokens": 5, "seed": 2})
    assert path.read_bytes() == whole
    assert journal.read(str(path))[1] == again.records
    with pytest.raises(InputError, match=r"configs=\[1\], and this run has \[2\]"):
        journal.Journal(str(path), {**header, "configs": [2]}, resume=True)
    lines = whole.decode().splitlines()
    path.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        journal.Journal(str(path), header, resume=True)
    with pytest.raises(InputError, match="cannot be written"):
        journal.Journal(str(tmp_path / "missing" / "out"), header, resume=False)


def test_what_processes_left_is_taken_up(tmp_path, monkeypatch):
    header = {"model": "m"}
    parts = [[0, 2], [1]]
    for number, seeds in enumerate(parts):
        book = journal.Journal(str(tmp_path / f"out.jsonl.{number}"), header, resume=False)
        for seed in seeds:
            book.add({"task": "t", "tokens": 5, "seed": seed})
    with pytest.raises(InputError, match="--resume"):
        spread.Book(str(tmp_path / "out.jsonl"), header, resume=False)
    found = spread.Book(str(tmp_path / "out.jsonl"), header, resume=True)
    assert sorted(record["seed"] for record in found.records) == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--out"):
        spread.Book(None, header, resume=False)
