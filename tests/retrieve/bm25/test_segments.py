"""Segments: pruned search against plain sums, merges beside searches, kills, damage, files of older code."""

from __future__ import annotations

import math
import os
import runpy
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.bm25.test_bm25 import add, check, expected, reopen, shrink
from ultrarag.errors import IndexStateError
from ultrarag.retrieve.bm25 import compressor, gathering, merging, store, topk
from ultrarag.retrieve.bm25.index import BM25
from ultrarag.retrieve.bm25.part import Part
from ultrarag.retrieve.bm25.terms import digest, tokenize

OLD = Path(__file__).parents[2] / "fixtures" / "dee4ec6" / "index-numpy" / "bm25"
VERSION_2 = Path(__file__).parents[2] / "fixtures" / "4a828a9"
PASSAGES = {f"p{row:03}": f"red word{row} word{row % 7} word{row % 3}" for row in range(60)}


@pytest.fixture
def index(tmp_path: Path):
    made = BM25.create(tmp_path / "bm25")
    yield made
    made.close()


# Pruning


class Plain:
    """A corpus of made-up words, and the formula over all of it."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        share = 1 / (np.arange(400) + 2.7)
        self.share = share / share.sum()
        lengths = self.rng.integers(3, 60, rows)
        self.words = [self.rng.choice(400, size=length, p=self.share) for length in lengths]
        self.words[: rows // 3] = sorted(self.words[: rows // 3], key=lambda row: np.sum(row == 5))  # clusters
        self.ids = [f"p{(7919 * row) % rows}" for row in range(rows)]
        self.texts = [" ".join(f"w{word}" for word in row) for row in self.words]
        self.lengths = np.array([len(row) for row in self.words])
        self.counts = np.stack([np.bincount(row, minlength=400) for row in self.words])
        self.alive = np.ones(rows, bool)

    def best(self, words: list[int], k: int, allowed: np.ndarray) -> list[tuple[str, float]]:
        scores, count = np.zeros(len(self.ids)), self.alive.sum()
        norm = 1.2 * (0.25 + 0.75 * self.lengths / self.lengths[self.alive].mean())
        for word, often in Counter(words).items():
            tf = self.counts[:, word]
            df = np.count_nonzero(tf[self.alive])
            scores += often * math.log(1 + (count - df + 0.5) / (df + 0.5)) * 2.2 * tf / (tf + norm)
        rounded = np.where(self.alive & allowed, scores, 0).astype(np.float32)
        rows = sorted(np.flatnonzero(rounded), key=lambda row: (-rounded[row], self.ids[row]))
        return [(self.ids[row], float(rounded[row])) for row in rows[:k]]


@pytest.mark.parametrize(
    ("batch", "long", "many"), [(10_000, 50, 0.0), (10_000, 200, 0.3), (10_000, 10_000, 0.15), (500, 20, 0.6)]
)
def test_pruned_search_finds_what_plain_sums_find(
    index: BM25, monkeypatch: pytest.MonkeyPatch, batch: int, long: int, many: float
) -> None:
    monkeypatch.setattr(store, "BATCH_ROWS", batch)
    monkeypatch.setattr(compressor, "LEAST_DENSE", 10)
    monkeypatch.setattr(compressor, "LEAST_PACKED", 5)
    monkeypatch.setattr(topk, "LONG_LIST", long)
    monkeypatch.setattr(topk, "MANY_WINDOWS", many)
    monkeypatch.setattr(topk, "FIRST_WINDOWS", 3)
    plain, rows = Plain(6000, long), np.arange(6000)
    for start in range(0, 6000, 500):
        part = slice(start, start + 500)
        index.upsert(plain.ids[part], plain.texts[part], [{"m": row % 7} for row in range(start, start + 500)])
    for turn in range(3):
        for number in range(25):
            size = int(plain.rng.integers(1, 8))
            common = plain.rng.integers(0, 8, size) if number % 3 == 0 else plain.rng.choice(400, size, p=plain.share)
            words, k = common.tolist(), int(plain.rng.choice([1, 10, 300]))
            filter_ = {"m": int(plain.rng.integers(7))} if number % 4 == 0 else None
            allowed = rows % 7 == filter_["m"] if filter_ else np.ones(6000, bool)
            wanted = plain.best(words, k, allowed)
            query = " ".join(f"w{word}" for word in words)
            found = index.search(query, k, filter_)
            np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], rtol=3e-7)
            assert [id for id, _ in found] == [id for id, _ in wanted]
            assert index.score(query, [id for id, _ in found]).tolist() == [score for _, score in found]
        died = plain.rng.choice(np.flatnonzero(plain.alive), 700, replace=False)
        plain.alive[died] = False
        index.delete([plain.ids[row] for row in died])
        if turn == 1:
            index.vacuum()


def test_long_passages_after_short_ones_raise_what_a_window_may_score(index: BM25, monkeypatch) -> None:
    monkeypatch.setattr(compressor, "LEAST_DENSE", 10)
    monkeypatch.setattr(topk, "LONG_LIST", 10)
    monkeypatch.setattr(topk, "FIRST_WINDOWS", 1)
    passages = {f"p{row:04}": f"red blue {'x ' * (row % 5)}{'blue ' * (row % 3)}" for row in range(2000)}
    add(index, passages)
    index.flush()
    index.search("red", 1)  # makes the segment, of which the mean length is small
    longer = {f"q{row}": "green " * 900 for row in range(50)}
    add(index, longer)
    check(index, passages | longer, "red blue")
    assert index.search("blue red", 7) == index.search("blue red", 2000)[:7]


def test_a_tie_of_thousands_is_cut_in_the_order_of_ids(index: BM25) -> None:
    ids = [
        f"{'very long prefix of an id ' * (row % 2)}{(7919 * row) % 5000:05}\x00{'é' * (row % 3)}"
        for row in range(5000)
    ]
    add(index, dict.fromkeys(ids, "red"))
    for k in (1, 2, 40, 2600):
        assert [id for id, _ in index.search("red", k)] == sorted(ids)[:k]


# Merges


def test_many_segments_become_few_beside_searches(index: BM25, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 3)
    failures: list[BaseException] = []
    ended = threading.Event()

    def search() -> None:
        try:
            while not ended.is_set():
                assert index.search("common", 1000)[0][1] > 0
                assert ("a", pytest.approx(0, abs=20)) in index.search("common first", 500)
        except BaseException as error:
            failures.append(error)

    passages = {"a": "common first"}
    add(index, passages)
    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        new = {f"p{number}x{row}": f"common w{row}" for row in range(4)}
        add(index, new)
        passages |= new
        gone = f"p{number - 5}x1"
        index.delete([gone])
        passages.pop(gone, None)
        if number % 10 == 0:
            index.flush()
    deadline = time.monotonic() + 30
    index.flush()
    while len(index._store.parts) > 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    ended.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(index._store.parts) <= 3
    check(index, passages, "common w1 first")
    index = reopen(index)
    check(index, passages, "common w1 first")
    index.close()


def test_searches_do_not_wait_for_a_merge(index: BM25, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4)
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(30)
        return gathering.merged(*arguments)

    monkeypatch.setattr(store, "merged", slow)
    for number in range(12):
        add(index, {f"p{number}x{row}": "red" for row in range(5)})
    assert begun.wait(30)
    assert len(index.search("red", 100)) == 60
    add(index, {"late": "red", "p0x0": "blue"})  # while its segment is being merged
    index.delete(["p1x1"])
    index.flush()
    go_on.set()
    index._merger._thread.join()
    assert len(index._store.parts) < 12
    assert {id for id, _ in index.search("red", 100)} >= {"late", "p0x1"}
    assert len(index.search("red", 100)) == 59
    assert [id for id, _ in index.search("blue", 9)] == ["p0x0"]
    again = reopen(index)
    assert len(again.search("red", 100)) == 59
    again.close()


def test_a_merge_that_fails_leaves_the_index_whole(index: BM25, monkeypatch, caplog) -> None:
    shrink(monkeypatch, 4)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "merged", full)
    for number in range(8):
        add(index, {f"p{number}x{row}": "red" for row in range(5)})
    index._merger._thread.join()
    assert "segments were not merged" in caplog.text
    assert len(index.search("red", 100)) == 40
    index.flush()


def test_a_rollback_while_merging_keeps_what_was_flushed(index: BM25, monkeypatch) -> None:
    shrink(monkeypatch, 4)
    monkeypatch.setattr(merging, "due", lambda parts: [])
    monkeypatch.setattr(merging, "loose", lambda parts: [])
    add(index, PASSAGES)
    index.flush()
    parts = index._store.parts
    add(index, {"later": "red"})
    index._store.rollback()
    index.delete(["p007"])
    later = index._store.parts
    index._store.rollback()
    index._store.merge(later)  # in which a passage is dead that lives again
    check(index, PASSAGES, "red word1 word5")
    index._store.merge(parts)
    assert index._store.parts[0].number > max(part.number for part in parts)
    check(index, PASSAGES, "red word1 word5")
    index.flush()
    again = reopen(index)
    check(again, PASSAGES, "red word1 word5")
    again.close()


def test_document_frequencies_of_the_living_are_counted_once(monkeypatch: pytest.MonkeyPatch, index: BM25) -> None:
    add(index, PASSAGES)
    index.delete(["p001", "p002"])
    check(index, {id: text for id, text in PASSAGES.items() if id not in ("p001", "p002")}, "red word1")
    counted: list[int] = []
    count = Part._dead_entries
    monkeypatch.setattr(
        Part, "_dead_entries", lambda self, number, died: counted.append(len(died)) or count(self, number, died)
    )
    index.search("red word1", 5)
    assert counted == []
    index.delete(["p003"])
    index.search("red", 5)
    assert counted == [1]  # the one that died since


def test_vacuum_leaves_one_segment_and_no_dead_rows(index: BM25, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, 4)
    for number in range(5):
        add(index, {f"p{number}x{row}": f"red w{row}" for row in range(10)})
    index.delete([f"p{number}x3" for number in range(5)])
    index.vacuum()
    [part] = index._store.parts
    assert (part.count, part.segment.rows, part.dead) == (45, 45, None)
    assert len(list(index.directory.glob("segment-*"))) == 1
    index.delete(list(index.ids()))
    index.vacuum()
    assert (index.count(), index.search("red", 3), index._store.parts) == (0, [], ())
    assert not list(index.directory.glob("segment-*"))


# Kills and damage


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize("stride", [311, pytest.param(23, marks=pytest.mark.long)])
def test_a_kill_at_any_step_of_writing_loses_nothing_that_was_flushed(stride: int, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_while_writing.py")), str(tmp_path), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5 * stride, "the script no longer sees the steps of writing"


@pytest.fixture
def filed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index that was closed, with one segment in a file."""
    monkeypatch.setattr(store, "FILE_ROWS", 10)
    index = BM25.create(tmp_path / "bm25")
    add(index, PASSAGES)
    index.close()
    assert len(list(index.directory.glob("segment-*.bm25"))) == 1
    return index.directory


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "replace"])
def test_a_damaged_segment_is_named(filed: Path, damage: str, sealed: bool) -> None:
    [file] = filed.glob("segment-*.bm25")
    if not sealed:  # as after a kill
        (filed / "checksums.json").unlink()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-9])
    elif damage == "replace":
        file.write_bytes(b"nonsense" * 9)
    with pytest.raises(IndexStateError, match=file.name.replace(".", r"\.")):
        BM25.open(filed)


def test_files_that_nobody_names_are_removed_by_the_next_owner_alone(filed: Path) -> None:
    left = filed / "segment-00000099.bm25"
    left.write_bytes(b"what a killed process wrote")
    (filed / "checksums.json").unlink()
    reader = BM25.open(filed, read_only=True)
    check(reader, PASSAGES, "red word3")
    with pytest.raises(IndexStateError, match="open for reading"):
        reader.upsert(["x"], ["x"], [{}])
    reader.close()
    assert left.exists()
    owner = BM25.open(filed)
    assert not left.exists()
    check(owner, PASSAGES, "red word3")
    owner.close()


# Format 1


def write_format_1(folder: Path, passages: dict[str, str], facts: dict[str, list[tuple[str, float]]]) -> None:
    """A file as format 1 had it: rows 0 and 2 to 8 sealed in lists, of which 2 and 3 are dead; others not."""
    folder.mkdir()
    (folder / "owner.lock").touch()
    db = sqlite3.connect(folder / "bm25.sqlite")
    db.executescript(
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value REAL NOT NULL);"
        "CREATE TABLE docs (row INTEGER PRIMARY KEY, id BLOB UNIQUE NOT NULL, length INTEGER NOT NULL, forward BLOB);"
        "CREATE TABLE postings (key INTEGER, first INTEGER, rows BLOB NOT NULL, numbers BLOB NOT NULL,"
        " PRIMARY KEY (key, first)) WITHOUT ROWID;"
    )
    meta = {"format": 1, "k1": 1.2, "b": 0.75, "sealed": 9}
    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    sealed: dict[int, list[tuple[int, float]]] = {}
    numbers = [0, 4, 5, 6, 7, 8, *range(9, 9 + len(passages) - 6)]
    rows = [(row, id, passages[id]) for row, id in zip(numbers, passages, strict=True)]
    for row, id, text in [*rows, (2, "", "red dead"), (3, "", "red dead too")]:
        held = [(digest("term", token), float(n)) for token, n in Counter(tokenize(text)).items()]
        held += [(digest("fact", fact), number) for fact, number in facts.get(id, [])]
        forward = None
        if row < 9:
            for key, number in held:
                sealed.setdefault(key, []).append((row, number))
        else:
            keys = np.array([key for key, _ in held], "<u8")
            forward = keys.tobytes() + np.array([number for _, number in held], "<f8").tobytes()
        if id:
            db.execute("INSERT INTO docs VALUES (?, ?, ?, ?)", (row, id.encode(), len(tokenize(text)), forward))
    for key, entries in sealed.items():
        entries.sort()
        first, values = entries[0][0], np.array([number for _, number in entries])
        distances = np.array([row - first for row, _ in entries], "<u2").tobytes()
        short = (values == np.floor(values)).all() and values.min() >= 0
        stored = b"" if (values == 1).all() else values.astype("<u2" if short else "<f8").tobytes()
        signed = int(np.array([key], np.uint64).view(np.int64)[0])
        db.execute("INSERT INTO postings VALUES (?, ?, ?, ?)", (signed, first, distances, stored))
    db.commit()
    db.close()


OF_BEFORE = {f"p{row}": f"red red word{row} word{row % 3} {'long ' * row}" for row in range(11)}
METADATA = {id: {"n": row, "part": row / 4} for row, id in enumerate(OF_BEFORE)}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    from ultrarag.retrieve.search import facts

    write_format_1(tmp_path / "old", OF_BEFORE, {id: facts(metadata) for id, metadata in METADATA.items()})
    return tmp_path / "old"


def check_old(index: BM25) -> None:
    check(index, OF_BEFORE, "red word1 long")
    check(index, OF_BEFORE, "red word1 long", {"n": {"gte": 3}, "part": {"lt": 2}}, METADATA)
    assert sorted(index.ids()) == sorted(OF_BEFORE)


@pytest.mark.parametrize("file_rows", [3, 8192])
def test_a_file_of_format_1_is_read_and_rewritten_once_by_its_owner(old: Path, monkeypatch, file_rows: int) -> None:
    monkeypatch.setattr(store, "FILE_ROWS", file_rows)
    before = (old / "bm25.sqlite").read_bytes()
    reader = BM25.open(old, read_only=True)
    check_old(reader)
    reader.close()
    assert (old / "bm25.sqlite").read_bytes() == before
    owner = BM25.open(old)
    check_old(owner)
    add(owner, {"new": "red new"})
    check(owner, {**OF_BEFORE, "new": "red new"}, "red new")
    owner.delete(["new"])
    owner.close()
    monkeypatch.setattr(store, "old_segment", None)
    for read_only in (True, False):
        again = BM25.open(old, read_only=read_only)
        check_old(again)
        again.close()


def test_a_rewriting_that_is_cut_off_leaves_the_old_file(old: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "zlib", None)
        with pytest.raises(AttributeError):
            BM25.open(old)
    index = BM25.open(old)
    check_old(index)
    index.close()


def test_the_file_of_an_index_of_dee4ec6_opens(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "bm25")
    reader = BM25.open(tmp_path / "bm25", read_only=True)
    hits = reader.search("hot steam", 5)
    assert hits
    reader.close()
    for _ in range(2):
        index = BM25.open(tmp_path / "bm25")
        assert index.search("hot steam", 5) == hits
        index.close()


# Segments of version 2


def test_segments_of_version_2_are_read_as_they_are_and_merged_into_new_ones(tmp_path: Path, monkeypatch) -> None:
    made = runpy.run_path(str(VERSION_2 / "make.py"))
    passages = {id: text for id, text in made["PASSAGES"].items() if id not in made["GONE"]}
    metadata, some = made["METADATA"], {"n": {"gte": 100}, "part": {"lt": 76}}
    shutil.copytree(VERSION_2 / "bm25", tmp_path / "bm25")
    before = {path.name: path.read_bytes() for path in (tmp_path / "bm25").iterdir()}
    for read_only in (True, False):
        index = BM25.open(tmp_path / "bm25", read_only=read_only)
        assert [part.segment.content[7] for part in index._store.parts] == [2, 2]
        check(index, passages, "red blue word3 number300")
        check(index, passages, "red blue", some, metadata)
        index.close()
        after = {path.name: path.read_bytes() for path in (tmp_path / "bm25").glob("segment-*")}
        assert after.items() <= before.items()
    monkeypatch.setattr(compressor, "LEAST_PACKED", 30)
    index = BM25.open(tmp_path / "bm25")
    add(index, {"new": "red new"}, {"new": {"n": 200}})
    index.vacuum()
    [part] = index._store.parts
    assert part.segment.content[7] == 3  # which code of before refuses: it would leave the packed lists out
    index = reopen(index)
    check(index, passages | {"new": "red new"}, "red blue word3 new")
    check(index, passages | {"new": "red new"}, "red blue", some, metadata | {"new": {"n": 200}})
    index.close()


def test_the_formula_of_these_tests_is_that_of_the_others() -> None:
    plain = Plain(40, 1)
    texts = dict(zip(plain.ids, plain.texts, strict=True))
    assert dict(plain.best([1, 2, 2], 40, np.ones(40, bool))) == pytest.approx(expected(texts, "w1 w2 w2"), rel=1e-6)
