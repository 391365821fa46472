"""BM25: exact statistics under change, against a plain reimplementation of the formula."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ultrarag.errors import DataError, IndexStateError, UsageError
from ultrarag.retrieve.bm25 import compressor, gathering, merging, store, topk
from ultrarag.retrieve.bm25.index import BM25
from ultrarag.retrieve.bm25.terms import tokenize
from ultrarag.retrieve.search.filters import matches, parse


@pytest.fixture
def index(tmp_path: Path):
    made = BM25.create(tmp_path / "bm25")
    yield made
    made.close()


def expected(passages: dict[str, str], query: str, k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    """Okapi BM25 with Lucene's idf, written down a second time."""
    counts = {id: Counter(tokenize(text)) for id, text in passages.items()}
    mean = sum(sum(c.values()) for c in counts.values()) / max(1, len(counts))
    scores: dict[str, float] = {}
    for token in tokenize(query):
        df = sum(token in c for c in counts.values())
        idf = math.log(1 + (len(counts) - df + 0.5) / (df + 0.5))
        for id, c in counts.items():
            if tf := c[token]:
                norm = k1 * (1 - b + b * sum(c.values()) / mean)
                scores[id] = scores.get(id, 0) + idf * tf * (k1 + 1) / (tf + norm)
    return scores


def add(index: BM25, passages: dict[str, str], metadata: dict[str, dict] | None = None) -> None:
    index.upsert(list(passages), list(passages.values()), [(metadata or {}).get(id, {}) for id in passages])


def check(index: BM25, passages: dict[str, str], query: str, filter: dict | None = None, metadata=None) -> None:
    scores = expected(passages, query)
    if filter:
        scores = {id: s for id, s in scores.items() if matches(parse(filter), (metadata or {}).get(id, {}))}
    found = index.search(query, 10_000, filter)
    assert dict(found) == {id: pytest.approx(score) for id, score in scores.items()}
    assert found == sorted(found, key=lambda hit: (-hit[1], hit[0]))
    best = index.search(query, 3, filter)
    assert [score for _, score in best] == pytest.approx([score for _, score in found[:3]])


def random_text(rng: random.Random) -> str:
    words = [f"w{min(int(rng.expovariate(0.15)), 60)}x" for _ in range(rng.randrange(0, 12))]
    return " ".join(words)


def shrink(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let a few passages be enough for files, merges in a thread, dense and packed lists and pruning."""
    monkeypatch.setattr(store, "BATCH_ROWS", rows)
    monkeypatch.setattr(store, "FILE_ROWS", 2 * rows)
    monkeypatch.setattr(merging, "BATCH_ROWS", rows)
    monkeypatch.setattr(merging, "FAN", 3)
    monkeypatch.setattr(merging, "IDLE", 0.01)
    monkeypatch.setattr(gathering, "PIECE_ENTRIES", 50)
    monkeypatch.setattr(compressor, "LEAST_DENSE", 3)
    monkeypatch.setattr(compressor, "LEAST_PACKED", 1)
    monkeypatch.setattr(topk, "LONG_LIST", 3)


@pytest.mark.parametrize("buffer", [7, 8192])
def test_scores_stay_exact_under_random_writes(index: BM25, monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    if buffer == 7:
        shrink(monkeypatch, buffer)
    rng, passages, metadata = random.Random(3), {}, {}
    for step in range(60):
        new = {f"p{rng.randrange(120)}": random_text(rng) for _ in range(rng.randrange(1, 9))}
        facts = {id: {"n": rng.randrange(5), "lang": rng.choice(["en", "zh"])} for id in new}
        add(index, new, facts)
        passages.update(new)
        metadata.update(facts)
        for id in rng.sample(sorted(passages), min(len(passages), rng.randrange(4))):
            index.delete([id, "unknown"])
            passages.pop(id)
        if step % 10 == 9:
            index = reopen(index)
        if step % 25 == 24:
            index.vacuum()
        assert index.count() == len(passages)
        assert set(index.ids()) == set(passages)
        query = " ".join(random_text(rng) for _ in range(2))
        check(index, passages, query)
        check(index, passages, query, {"lang": "zh", "n": {"gte": 1}}, metadata)
        asked = [*passages, "unknown"]
        wanted = expected(passages, query)
        np.testing.assert_allclose(index.score(query, asked), [*(wanted.get(id, 0.0) for id in passages), np.nan])
    index.close()


def reopen(index: BM25) -> BM25:
    index.close()
    return BM25.open(index.directory)


def test_chinese_and_english(index: BM25) -> None:
    passages = {
        "zh": "向量数据库用于语义检索。",
        "en": "Vector databases serve semantic retrieval.",
        "mix": "Milvus是一个向量数据库",
    }
    add(index, passages)
    assert [id for id, _ in index.search("什么是数据库", 5)] == ["mix", "zh"]
    assert [id for id, _ in index.search("the DATABASE", 5)] == ["en"]
    assert [id for id, _ in index.search("ｍｉｌｖｕｓ", 5)] == ["mix"]


def test_tokens() -> None:
    assert tokenize("Diseases, therapies & viruses: COVID-19's glass") == [
        "disease", "therapy", "viruse", "covid", "19", "s", "glass",
    ]  # fmt: skip
    assert tokenize("用Milvus检索") == ["用", "milvus", "检", "索", "检索"]
    assert tokenize("naïve CAFÉ") == ["naïve", "café"]
    assert tokenize("ひらがな 한국") == [*"ひらがな", "ひら", "らが", "がな", *"한국", "한국"]
    assert tokenize(" \x00\ud800…") == []


def test_empty_index_odd_texts_and_large_k(index: BM25) -> None:
    assert index.search("anything", 5) == []
    assert index.score("anything", ["a"]).tolist() == pytest.approx([np.nan], nan_ok=True)
    index.upsert([], [], [])
    passages = {"a/b": "", "\ud800": "lone \ud800 surrogate", "\x00": "nul \x00 byte", "long": "many words " * 9000}
    add(index, passages)
    check(index, passages, "surrogate byte word")
    assert index.search("", 5) == []
    assert index.search("…", 5) == []
    assert len(index.search("lone nul many", 1000)) == 3


def test_of_an_id_twice_in_one_call_the_last_wins(index: BM25) -> None:
    index.upsert(["a", "b", "a"], ["one", "two", "three"], [{}, {}, {}])
    assert index.count() == 2
    check(index, {"a": "three", "b": "two"}, "one two three")


def test_filter_is_applied_before_top_k(index: BM25) -> None:
    passages = {f"p{i:03}": "common " * (200 - i) for i in range(200)}
    metadata = {id: {"n": i} for i, id in enumerate(passages)}
    add(index, passages, metadata)
    found = index.search("common", 5, {"n": {"gte": 150}})
    assert len(found) == 5
    assert all(metadata[id]["n"] >= 150 for id, _ in found)


@pytest.mark.parametrize("long_list", [2, 20_000])
def test_ties_come_in_the_order_of_ids_for_every_k(
    index: BM25, monkeypatch: pytest.MonkeyPatch, long_list: int
) -> None:
    monkeypatch.setattr(topk, "LONG_LIST", long_list)
    monkeypatch.setattr(compressor, "LEAST_DENSE", long_list)
    texts = ["red green blue", "green blue red", "blue red green"]  # equal scores of texts that are not the same
    ids = [f"p{(7 * row) % 40:02}" for row in range(40)]
    for order in (ids, ids[::-1]):
        index.delete(ids)
        add(index, {id: texts[row % 3] for row, id in enumerate(order)} | {"best": "red green"})
        for query in ("red", "blue green red"):
            everything = index.search(query, 100)
            assert [id for id, _ in everything[1:]] == sorted(ids) or query != "red"
            for k in range(1, 43):
                assert index.search(query, k) == everything[:k]
            asked = [id for id, _ in everything]
            assert index.score(query, asked).tolist() == [score for _, score in everything]


def test_bad_input_is_refused_and_changes_nothing(index: BM25) -> None:
    add(index, {"a": "one"})
    with pytest.raises(DataError, match="non-empty string"):
        index.upsert(["b", ""], ["x", "y"], [{}, {}])
    with pytest.raises(UsageError, match="2 ids, 1 texts"):
        index.upsert(["b", "c"], ["x"], [{}, {}])
    with pytest.raises(DataError, match="'when'"):
        index.upsert(["b"], ["x"], [{"when": object()}])
    with pytest.raises(UsageError, match="positive integer"):
        index.search("one", 0)
    with pytest.raises(UsageError, match="unknown bound"):
        index.search("one", 1, {"n": {"over": 1}})
    with pytest.raises(UsageError, match="k1 is -1"):
        BM25.create(index.directory / "x", k1=-1)
    check(index, {"a": "one"}, "one x")


def test_a_full_disk_returns_to_the_last_flush(index: BM25) -> None:
    add(index, {"a": "one", "b": "two"})
    index.flush()
    pages = index._store._db.execute("PRAGMA page_count").fetchone()[0]
    index._store._db.execute(f"PRAGMA max_page_count = {pages + 5}")
    add(index, {"a": "two", "c": "three"})
    add(index, {f"p{i}": " ".join(f"w{i}x{j}" for j in range(500)) for i in range(20)})
    with pytest.raises(IndexStateError, match=r"bm25\.sqlite': No space left on device; make room"):
        index.flush()
    check(index, {"a": "one", "b": "two"}, "one two three four")
    add(index, {"a": "three"})
    check(index, {"a": "three", "b": "two"}, "one two three four")


def test_settings_are_kept(tmp_path: Path) -> None:
    made = BM25.create(tmp_path / "bm25", k1=0.9, b=0.4)
    passages = {"a": "one one two", "b": "two three four five"}
    add(made, passages)
    again = reopen(made)
    assert dict(again.search("one two", 5)) == pytest.approx(expected(passages, "one two", 0.9, 0.4))
    again.close()


def test_what_was_flushed_survives_a_crash(tmp_path: Path) -> None:
    script = """
        import os, sys
        from ultrarag.retrieve.bm25.index import BM25
        index = BM25.create(sys.argv[1])
        index.upsert(["a", "b"], ["one", "two"], [{}, {}])
        index.flush()
        index.upsert(["a", "c"], ["three", "four"], [{}, {}])
        index.delete(["b"])
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "bm25")]
    assert subprocess.run(command, check=False).returncode == -9
    index = BM25.open(tmp_path / "bm25")
    check(index, {"a": "one", "b": "two"}, "one two three four")
    index.close()


def test_files_and_owners(index: BM25) -> None:
    add(index, {"a": "one"})
    with pytest.raises(IndexStateError, match="in use by this process"):
        BM25.open(index.directory)
    index.close()
    index.close()
    with pytest.raises(IndexStateError, match="was closed"):
        index.search("one", 1)
    with pytest.raises(IndexStateError, match="not empty"):
        BM25.create(index.directory)
    with pytest.raises(IndexStateError, match="holds no BM25 index"):
        BM25.open(index.directory / "nothing")
    path = index.directory / "bm25.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IndexStateError, match=r"bm25\.sqlite' does not have the content"):
        BM25.open(index.directory)
    os.truncate(path, 5000)
    with pytest.raises(IndexStateError, match=r"bm25\.sqlite' has 5000 bytes"):
        BM25.open(index.directory)
    (index.directory / "checksums.json").unlink()
    with pytest.raises(IndexStateError, match=r"bm25\.sqlite': "):
        BM25.open(index.directory)


def test_searches_while_writing(index: BM25) -> None:
    failures: list[BaseException] = []

    def search() -> None:
        try:
            for _ in range(100):
                assert ("a", pytest.approx(0, abs=20)) in index.search("one", 500)
        except BaseException as error:
            failures.append(error)

    add(index, {"a": "one"})
    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(50):
        add(index, {f"p{i}": "one two"})
        index.delete([f"p{i - 10}"])
    for thread in threads:
        thread.join()
    assert not failures
    assert index.count() == 11
