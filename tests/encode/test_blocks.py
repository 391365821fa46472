"""Blocks: the loop, the check that a rerun does the same work, and the marks in a ledger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ultrarag.encode.blocks import Ledger, encode_blocks, encode_rest, same_work
from ultrarag.errors import DataError, FingerprintError
from ultrarag.io.vectors import Vectors

TEXTS = [f"passage number {n} " + "and more " * (n % 7) for n in range(23)]


def test_short_and_empty_blocks_are_written_as_they_are(minilm_encoder):
    blocks = [(0, TEXTS[:4]), (2, TEXTS[4:8]), (3, TEXTS[8:9]), (5, []), (7, TEXTS[9:13]), (8, TEXTS[13:16]), (9, [])]
    expected = minilm_encoder.encode(TEXTS, progress=False).dense
    written = []

    def write(number, texts, vectors):
        written.append((number, texts))
        where = [TEXTS.index(text) for text in texts]
        assert (vectors is None) == (not texts)
        if texts:
            np.testing.assert_allclose(vectors.dense, expected[where], atol=1e-6)

    encode_blocks(minilm_encoder, iter(blocks), write, chunk_texts=4, total=16, progress=False)
    assert written == blocks


def test_what_a_killed_process_committed_is_not_encoded_again(minilm_encoder, tmp_path):
    """The texts are drawn from where the vectors end, and each block is safe before the next is written."""

    class Killed(BaseException):
        pass

    vectors = Vectors(tmp_path, ["dense"])
    append = vectors.append
    vectors.append = lambda found: append(found) if vectors.rows < 10 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        encode_rest(minilm_encoder, vectors, TEXTS, len(TEXTS), 5, progress=False)
    vectors.close()
    again = Vectors(tmp_path, ["dense"])
    assert again.rows == 10
    drawn = []
    encode_rest(minilm_encoder, again, (drawn.append(t) or t for t in TEXTS[10:]), len(TEXTS), 5, progress=False)
    assert drawn == TEXTS[10:]
    np.testing.assert_allclose(again.read(0, 23).dense, minilm_encoder.encode(TEXTS, progress=False).dense, atol=1e-6)
    again.close()


WORK = {"fingerprint": "f", "heads": ["dense"], "corpus": {"bytes": 9, "sha256": "s"}}


@pytest.mark.parametrize(
    ("before", "error", "message"),
    [
        ({"fingerprint": "g"}, FingerprintError, "another model: take another"),
        ({"heads": ["dense", "sparse"]}, DataError, "another heads"),
        ({"corpus": {"bytes": 9, "sha256": "t"}}, DataError, r"another corpus \({'bytes': 9, 'sha256': 't'}, now"),
        ({"more": 1}, DataError, "another more"),
        ({"precision": "int8:0123"}, DataError, r"another precision \('int8:0123', now 'fp32'\)"),
    ],
)
def test_other_work_is_refused(tmp_path, before, error, message):
    (tmp_path / "note.json").write_text(json.dumps({**WORK, **before, "finished": False}))
    with pytest.raises(error, match=message):
        same_work(tmp_path / "note.json", WORK, "take another")


def test_the_same_work_goes_on(tmp_path):
    note = tmp_path / "note.json"
    assert not same_work(note, WORK, "")
    note.write_text(json.dumps({**WORK, "corpus": {"bytes": 9}, "finished": True}))  # of a version without digests
    assert same_work(note, WORK, "")
    note.write_text("{")
    with pytest.raises(DataError, match=r"note.json' is damaged .*: remove it"):
        same_work(note, WORK, "remove it")


@pytest.fixture
def opened():
    """Opens ledgers, whose files are closed in the end."""
    ledgers: list[Ledger] = []

    def opening(*arguments) -> Ledger:
        ledgers.append(Ledger(*arguments))
        return ledgers[-1]

    yield opening
    for ledger in ledgers:
        ledger._file.close()


def test_a_ledger_knows_what_was_confirmed(tmp_path: Path, opened) -> None:
    path = tmp_path / "ledger"
    ledger = opened(path, "c", 10, 10 + 35, 10)
    assert ledger.missing() == [0, 1, 2, 3]
    assert [ledger.block_of(row) for row in (11, 20, 21, 45)] == [0, 0, 1, 3]
    assert ledger.rows_of(1) == (20, 30)
    ledger.confirm(2, 9)
    ledger.confirm(0, 10)
    ledger.close()
    with open(path, "a") as file:
        file.write("3 1")  # torn by a crash
    again = opened(path, "c", 10, 65, 999)  # two blocks more of the size that it has
    assert (again.missing(), again.passages) == ([1, 3, 4, 5], 19)
    again.forget([0])
    again.confirm(1, 1)
    again.close()
    assert opened(path, "c", 10, 65, 999).confirmed == {2: 9, 1: 1}


@pytest.mark.parametrize(("collection", "first", "content"), [("d", 10, None), ("c", 0, None), ("c", 10, "no JSON")])
def test_a_ledger_of_something_else_is_begun_anew(tmp_path: Path, opened, collection, first, content) -> None:
    path = tmp_path / "ledger"
    ledger = opened(path, "c", 10, 20, 10)
    ledger.confirm(0, 10)
    ledger.close()
    if content:
        path.write_text(content)
    assert opened(path, collection, first, 20, 10).confirmed == {}


def test_blocks_of_a_large_index_are_larger(tmp_path: Path, opened) -> None:
    ledger = opened(tmp_path / "ledger", "c", 0, 10**9, 2048)
    assert len(ledger.missing()) == 20_000
    assert ledger.rows_of(19_999)[1] >= 10**9
