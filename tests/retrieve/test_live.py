"""LiveIndex: writing, searching with every head, building, the gate, swapping and rolling back."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests import forked
from ultrarag.errors import CheckpointError, DataError, FingerprintError, GateError, IndexStateError, UsageError
from ultrarag.retrieve import evaluate, read_passages, read_status, rerank
from ultrarag.retrieve.engines.registry import default_backend
from ultrarag.retrieve.generation import source as sources
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages.store import Written
from ultrarag.types import Hit, Passage

#: The tiny tokenizer knows letters and no digits: passages must differ in words.
PLACES = ["north", "south", "east", "west", "home", "work", "school", "sea", "hill", "road", "farm", "bank", "port"]
TOPICS = ["vector database", "red apple", "deep ocean", "old castle", "fast train", "quiet library", "green forest"]
EVERY = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0, "bm25": 0.1}


def corpus(count: int, start: int = 0) -> list[Passage]:
    return [Passage(f"p{n}", text_of(n), metadata={"n": n, "even": n % 2 == 0}) for n in range(start, start + count)]


def text_of(number: int) -> str:
    """A text of its own for each of the numbers to 7 x 13."""
    return f"the {TOPICS[number % len(TOPICS)]} near the {PLACES[number % len(PLACES)]}, number {number}"


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def count_encoded(monkeypatch: pytest.MonkeyPatch, live: LiveIndex) -> list[str]:
    """Every passage text that is encoded from now on."""
    seen: list[str] = []
    tokenize = live.encoder.tokenize

    def counting(texts, kind, *limits, **options):
        if kind == "passage":
            seen.extend(texts)
        return tokenize(texts, kind, *limits, **options)

    monkeypatch.setattr(live.encoder, "tokenize", counting)
    return seen


# Writing


def test_what_was_added_is_found_by_every_head(live: LiveIndex, tiny) -> None:
    passages = corpus(20)
    assert live.add(passages) == Written(added=20)
    query, held = tiny.encode([text_of(7)], "query"), tiny.encode([passage.content for passage in passages])
    for head in ("dense", "sparse", "colbert", "bm25"):
        best = 7 if head == "bm25" else int(tiny.similarity(query, held, {head: 1.0})[0].argmax())
        hits = live.search(text_of(7), k=3, heads=[head])
        assert hits[0].passage == passages[best], head
        assert dict(hits[0].scores) == {head: hits[0].score}


def test_an_unchanged_text_is_not_encoded_again(live: LiveIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    live.add(corpus(6))
    seen = count_encoded(monkeypatch, live)
    assert live.add(corpus(6)) == Written(unchanged=6)
    relabelled = [Passage(p.id, p.text, metadata={"n": 100}) for p in corpus(3)]
    assert live.upsert(relabelled) == Written(metadata=3)
    assert seen == []
    assert set(ids(live.search("number", heads=["dense"], filter={"n": 100}))) == {"p0", "p1", "p2"}
    assert set(ids(live.search("number", heads=["bm25"], filter={"n": 100}))) == {"p0", "p1", "p2"}
    assert live.add([Passage("p0", "another text")]) == Written(changed=1)
    assert seen == ["another text"]


def test_delete_get_and_length(live: LiveIndex) -> None:
    live.add(corpus(5))
    assert live.delete(["p1", "p3", "nobody"]) == 2
    assert live.delete("p4") == 1
    assert (len(live), live.get("p1"), live.get("p0")) == (2, None, corpus(1)[0])
    assert ids(live.search("number", k=10, heads=["dense"])) == ids(live.search("number", k=99, heads=["dense"]))
    assert set(ids(live.search("number", k=10, heads=["dense"]))) == {"p0", "p2"}
    assert [passage.id for passage in live.passages()] == ["p0", "p2"]


def test_passages_of_any_size_and_ids_of_any_form(live: LiveIndex) -> None:
    odd = [
        Passage("a/b/../c", "slashes"),
        Passage("日本/語", "向量数据库"),
        Passage("nul\0id", "nul \0 byte"),
        Passage("long", "word " * 20_000),
        Passage("title alone", "", "Milvus"),
    ]
    live.add(odd)
    assert len(live) == 5
    hits = live.search("向量数据库", k=50, heads=["dense"])
    assert hits[0].id == "日本/語"
    assert {hit.id: hit.passage for hit in hits} == {passage.id: passage for passage in odd}
    assert live.delete([passage.id for passage in odd]) == 5


def test_a_refused_passage_is_named_and_the_batches_before_it_are_kept(live: LiveIndex) -> None:
    with pytest.raises(DataError, match="'bad'"):
        live.add([*corpus(3), Passage("bad", "\ud800")])
    assert len(live) == 0
    with pytest.raises(UsageError, match="put one alone into a list"):
        live.add(Passage("1", "x"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="non-empty string"):
        live.delete([""])


@pytest.mark.parametrize("blank", ["", "  ", "\n", "\u200b\ufeff", "\u00ad\u2060\u200e", "\u3164", "\x00"])
def test_a_blank_passage_is_refused_by_its_id_and_a_blank_query_finds_nothing(live: LiveIndex, blank: str) -> None:
    for passage in (Passage("void", blank), Passage("void", blank, blank), {"id": "void", "text": blank}):
        with pytest.raises(DataError, match="passage 'void' is blank"):
            live.add([passage])
    live.add([Passage("title", blank, "a title"), Passage("joined", f"क्\u200dष{blank}")])
    assert len(live) == 2
    assert live.search(blank, heads=["dense"]) == []


def test_an_empty_index_and_an_empty_query_find_nothing(live: LiveIndex) -> None:
    assert live.search("anything", weights=EVERY) == []
    assert live.search("anything", heads=["colbert"]) == []
    assert live.add([]) == Written()
    live.add(corpus(3))
    assert live.search("", weights=EVERY) == live.search(" \n", heads=["bm25"]) == []
    assert [len(hits) for hits in live.search_many(["", "number", ""], k=2, heads=["dense"])] == [0, 2, 0]
    assert live.search_many([], heads=["dense"]) == []
    assert live.delete([]) == 0


# Searching


def test_fused_scores_are_what_the_heads_say(live: LiveIndex, tiny) -> None:
    passages = corpus(30)
    live.add(passages)
    query = "a fast train to the old castle"
    hits = live.search(query, k=30, weights=EVERY, normalize="raw")
    left, right = tiny.encode([query], "query"), tiny.encode([p.content for p in passages])
    heads = {head: weight for head, weight in EVERY.items() if head != "bm25"}
    expected = tiny.similarity(left, right, heads)[0]
    words = {hit.id: hit.score for hit in live.search(query, k=30, heads=["bm25"])}
    for hit in hits:
        assert set(hit.scores) == set(EVERY)
        assert hit.score == pytest.approx(expected[int(hit.id[1:])] + 0.1 * words.get(hit.id, 0.0), abs=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(hits) == 30


def test_rrf_needs_no_weights_and_a_sum_does(live: LiveIndex) -> None:
    live.add(corpus(10))
    assert len(live.search("old castle", k=4, fusion="rrf")) == 4
    with pytest.raises(UsageError, match=r"3 heads \(dense, sparse, colbert\) need explicit weights"):
        live.search("old castle")
    with pytest.raises(UsageError, match="2 heads"):
        live.search("old castle", heads=["dense", "bm25"])


def test_a_head_with_weight_0_is_left_out(live: LiveIndex) -> None:
    live.add(corpus(10))
    alone = live.search("old castle", heads=["dense"])
    assert live.search("old castle", weights={"dense": 2, "sparse": 0, "colbert": 0}) == alone


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": {"dens": 1}}, "no head 'dens'; did you mean 'dense'"),
        ({"heads": []}, "names none"),
        ({"weights": {"dense": 0}}, "all are 0"),
        ({"weights": {"dense": -1}}, "'dense' is -1"),
        ({"weights": "dense"}, "weights is 'dense'; it maps each head to a number, such as {'dense': 1}"),
        ({"weights": ["dense", "bm25"]}, "such as {'dense': 1, 'bm25': 1}"),
        ({"weights": {"dense": "1"}}, "'dense' is '1'; a weight is a finite number"),
        ({"heads": ["dense"], "weights": "dense"}, "weights is 'dense'"),
        ({"heads": ["dense"], "weights": {"bm25": 1}}, "no head 'bm25'"),
        ({"heads": ["dense"], "k": 0}, "k is 0"),
        ({"weights": EVERY, "fusion": "sum"}, "fusion is 'sum'"),
        ({"weights": EVERY, "normalize": "z"}, "normalize is 'z'"),
        ({"heads": ["dense"], "fusion": "sum"}, "fusion is 'sum'"),
        ({"heads": ["dense"], "normalize": "z"}, "normalize is 'z'"),
        ({"heads": ["dense"], "filters": {}}, "no argument 'filters'; did you mean 'filter'"),
        ({"heads": ["dense"], "filter": {"n": {"over": 3}}}, "unknown bound"),
    ],
)
def test_search_says_what_cannot_be(live: LiveIndex, options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        live.search("query", **options)


def test_queries_that_are_no_text(live: LiveIndex) -> None:
    live.add(corpus(1))
    with pytest.raises(UsageError, match="query 1 is int"):
        live.search_many(["a", 1], heads=["dense"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="several queries"):
        live.search_many("abc", heads=["dense"])
    with pytest.raises(DataError, match="lone surrogate"):
        live.search("\ud800", heads=["dense"])


def test_a_filter_leaves_k_hits_when_k_exist(live: LiveIndex) -> None:
    live.add(corpus(100))
    for options in ({"heads": ["dense"]}, {"heads": ["colbert"]}, {"weights": EVERY}):
        hits = live.search("number", k=8, filter={"n": {"gte": 50}, "even": True}, **options)
        assert len(hits) == 8
        assert all(hit.passage.metadata["n"] >= 50 and hit.passage.metadata["even"] for hit in hits)


def test_one_id_needs_no_list(live: LiveIndex) -> None:
    live.add(corpus(3))
    assert live.existing("p1") == {"p1"}
    np.testing.assert_array_equal(live.vectors("p1").dense, live.vectors(["p1"]).dense)
    for ask in (live.existing, live.vectors, live.delete):
        with pytest.raises(DataError, match="a passage's id is a non-empty string, not 1"):
            ask([1])
    assert (live.delete("p1"), len(live)) == (1, 2)


def test_vectors_of_another_model_are_refused(live: LiveIndex, tiny, other) -> None:
    live.add(corpus(5))
    query = tiny.encode(["old castle"], "query")
    assert live.search_embeddings(query, tiny.fingerprint, k=3, heads="dense")[0] == live.search(
        "old castle", k=3, heads="dense"
    )
    with pytest.raises(FingerprintError, match=other.fingerprint[:12]):
        live.search_embeddings(query, other.fingerprint, heads=["dense"])
    with pytest.raises(UsageError, match="'bm25' is to be searched"):
        live.search_embeddings(query, tiny.fingerprint, heads=["bm25"])
    live.close()
    with pytest.raises(FingerprintError, match="was built by the encoder"):
        LiveIndex.open(live.path, other)


def test_query_vectors_with_their_texts_are_searched_by_words_too(live: LiveIndex, tiny) -> None:
    live.add(corpus(20))
    texts, weights = ["old castle", "books"], {"dense": 1, "bm25": 0.5}
    made = tiny.encode(texts, "query")
    found = live.search_embeddings(made, tiny.fingerprint, 3, weights=weights, texts=texts)
    assert found == live.search_many(texts, 3, weights=weights)
    for wrong in ("old castle", texts[:1]):
        with pytest.raises(UsageError, match="texts must list a text for each of the 2 embeddings"):
            live.search_embeddings(made, tiny.fingerprint, heads=["dense"], texts=wrong)
    with pytest.raises(UsageError, match="give the queries' texts"):
        live.search_embeddings(made, tiny.fingerprint, weights=weights)


def test_evaluate_and_rerank(live: LiveIndex, tiny) -> None:
    passages = corpus(10)
    live.add(passages)
    queries = {f"q{n}": passages[n].text for n in range(10)}
    qrels = {f"q{n}": {f"p{n}": 1} for n in range(10)}
    found = evaluate(live, queries, qrels, ["nDCG@10", "Recall@5"], heads=["dense"])
    assert found.metrics == {"nDCG@10": 1.0, "Recall@5": 1.0}
    assert found == live.evaluate(queries, qrels, ["nDCG@10", "Recall@5"], heads=["dense"])
    with pytest.raises(UsageError, match="'q0'"):
        live.evaluate({}, qrels)
    same = live.evaluate({"p1": passages[1].text}, {"p1": {"p2": 1}}, ["MRR@10"], heads=["dense"])
    ignored = live.evaluate(
        {"p1": passages[1].text}, {"p1": {"p2": 1}}, ["MRR@10"], heads=["dense"], ignore_identical_ids=True
    )
    assert "1 of 1 queries found the passage that has their own id" in same.notes[0]
    assert list(ignored.run["p1"]) == [id for id in same.run["p1"] if id != "p1"]
    assert ignored.metrics["MRR@10"] > same.metrics["MRR@10"]
    hits = live.search("fast train", k=10, heads=["bm25"])
    ranked = rerank(tiny, "fast train", hits, weights={"colbert": 1})
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)
    assert {hit.id: hit.scores["retrieval"] for hit in ranked} == {hit.id: hit.score for hit in hits}
    assert rerank(tiny, "x", []) == []


# Opening and closing


def test_everything_is_there_after_reopening_without_the_original_checkpoint(live: LiveIndex) -> None:
    live.add(corpus(12))
    live.delete(["p3"])
    before = live.search("old castle", k=20, weights=EVERY)
    fingerprint = live.fingerprint
    live.close()
    live.close()
    for use in (lambda: live.search("x", heads=["dense"]), lambda: live.add([]), lambda: live.get("p1"), live.status):
        with pytest.raises(IndexStateError, match="was closed"):
            use()
    with LiveIndex.open(live.path) as again:
        assert again.fingerprint == fingerprint
        assert same(again.search("old castle", k=20, weights=EVERY), before)


def same(left: list[Hit], right: list[Hit]) -> bool:
    """The same passages with the same scores, but for rounding."""
    scores = [np.array([hit.score for hit in hits]) for hits in (left, right)]
    return [hit.passage for hit in left] == [hit.passage for hit in right] and np.allclose(*scores, atol=1e-5)


def test_an_index_has_one_owner_and_any_reader(live: LiveIndex) -> None:
    live.add(corpus(4))
    with pytest.raises(IndexStateError, match="in use by this process"):
        LiveIndex.open(live.path)
    code = "import sys, json; from ultrarag.retrieve import *; " + (
        "print(json.dumps([read_status(sys.argv[1]), [p.id for p in read_passages(sys.argv[1])]]))"
    )
    told = forked.run(["-c", code, str(live.path)])
    assert f'"pid": {os.getpid()}' in told.stdout
    assert '["p0", "p1", "p2", "p3"]' in told.stdout
    status = live.status()
    assert (status["passages"], status["live"]["id"], status["previous"]) == (4, 1, None)
    assert status["live"]["behind"] == 4  # not flushed yet: a crash would replay these
    live.close()
    assert read_status(live.path)["owner"] is None
    assert read_status(live.path)["live"]["behind"] == 0
    assert list(read_passages(live.path)) == corpus(4)


def test_create_takes_only_an_empty_place_and_appears_whole(tmp_path: Path, tiny, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(IndexStateError, match="not empty"):
        LiveIndex.create(tmp_path / "full", tiny)
    with pytest.raises(UsageError, match="no head 'dens'; did you mean 'dense'"):
        LiveIndex.create(tmp_path / "kb", tiny, heads=["dens"])
    with pytest.raises(UsageError, match="no backend 'nump'"):
        LiveIndex.create(tmp_path / "kb", tiny, backend="nump")
    assert not (tmp_path / "kb").exists()
    with pytest.raises(IndexStateError, match="there is no index"):
        LiveIndex.open(tmp_path / "kb")
    with LiveIndex.create(tmp_path / "kb", tiny, heads=["dense"], bm25=False, backend="numpy") as live:
        live.add(corpus(3))
        assert len(live.search("number", k=2)) == 2
        with pytest.raises(UsageError, match="no head 'bm25'; it has dense"):
            live.search("number", weights={"bm25": 1})


def test_damaged_files_are_named_and_vectors_can_be_made_again(live: LiveIndex, tiny) -> None:
    live.add(corpus(9))
    before = live.search("old castle", weights=EVERY)
    live.close()
    root = live.path / "generations" / "1"
    vectors = next((root / "vectors").glob("vectors-*.npz"))
    content = bytearray(vectors.read_bytes())
    content[len(content) // 2] ^= 1
    vectors.write_bytes(content)
    with pytest.raises(IndexStateError, match=rf"{vectors.name}.*repair=True"):
        LiveIndex.open(live.path, tiny)
    (live.path / "bm25" / "bm25.sqlite").write_bytes(b"nonsense")
    with LiveIndex.open(live.path, tiny, repair=True) as again:
        assert same(again.search("old castle", weights=EVERY), before)
    weights = root / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 64
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint is not the encoder of generation 1"):
        LiveIndex.open(live.path)


def test_a_write_that_the_engine_refuses_is_kept_and_made_up_for(live: LiveIndex, monkeypatch) -> None:
    backend = live._core.live.backend
    upsert = backend.upsert

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    live.add(corpus(3))
    monkeypatch.setattr(backend, "upsert", full)
    with pytest.raises(IndexStateError, match=r"stored and will not be lost.*No space left"):
        live.add(corpus(6))
    assert len(live) == 6
    assert len(live.search("number", heads=["dense"])) == 3
    monkeypatch.setattr(backend, "upsert", upsert)
    live.add([])  # writes nothing
    live.delete(["p0"])
    assert set(ids(live.search("number", heads=["dense"]))) == {"p1", "p2", "p3", "p4", "p5"}


# Building, swapping, rolling back


def test_build_swap_and_rollback_keep_every_write(live: LiveIndex, checkpoint: Path, other, quick_builds) -> None:
    live.add(corpus(20))
    old = live.fingerprint
    new = live.build(checkpoint)
    assert (new.id, new.state, new.fingerprint) == (2, "ready", other.fingerprint)
    live.add([*corpus(3, start=20), Passage("p0", "rewritten"), Passage("p1", corpus(2)[1].text, metadata={"late": 1})])
    live.delete(["p2"])
    flip = live.swap(new)
    assert (flip.old.state, flip.new.state, live.fingerprint) == ("previous", "live", other.fingerprint)
    assert_complete(live, 22)
    live.add(corpus(2, start=30))
    live.delete(["p22"])
    assert live.rollback().new.id == 1
    assert live.fingerprint == old
    assert_complete(live, 23)
    assert ids(live.search("x", heads=["dense"], filter={"late": 1})) == ["p1"]
    assert live.rollback().new.id == 2
    assert_complete(live, 23)
    live.close()
    with LiveIndex.open(live.path) as again:
        assert again.fingerprint == other.fingerprint
        assert_complete(again, 23)


def assert_complete(live: LiveIndex, count: int) -> None:
    """Every passage has the vectors that the live encoder gives it, and is found."""
    passages = list(live.passages())
    assert len(live) == len(passages) == count
    backend = live._core.live.backend
    assert sorted(backend.ids()) == sorted(passage.id for passage in passages)
    held = backend.vectors([passage.id for passage in passages]).dense
    fresh = live.encoder.encode([passage.content for passage in passages]).dense
    np.testing.assert_allclose(held, fresh, atol=1e-5)
    for passage in passages[:: max(1, count // 4)]:
        assert live.search(passage.text, k=1, heads=["bm25"])[0].id == passage.id


def test_the_new_generation_stands_without_its_checkpoint(live: LiveIndex, other, tmp_path: Path, quick_builds) -> None:
    live.add(corpus(4))
    folder = other.save(tmp_path / "ckpt")
    (folder / "optimizer.pt").write_bytes(b"not part of the model")
    new = live.build(folder)
    shutil.rmtree(folder)
    live.swap(new.id)
    live.close()
    with LiveIndex.open(live.path) as again:
        assert again.fingerprint == other.fingerprint
    assert not list(live.path.rglob("optimizer.pt"))


def test_a_damaged_checkpoint_is_not_built(live: LiveIndex, other, tmp_path: Path) -> None:
    folder = other.save(tmp_path / "ckpt")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-50] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*checksum"):
        live.build(folder)
    assert live.status()["live"]["id"] == 1


def worse(live: LiveIndex):
    """A gate at which whatever is not generation 1 loses: its own hits are the only right answers."""
    queries = {f"q{n}": text_of(3 * n) for n in range(28)}
    found = live.search_many(list(queries.values()), k=1, heads=["dense"])
    return queries, {q: {hits[0].id: 1} for q, hits in zip(queries, found, strict=True)}


def scrambled(tiny_m3: str):
    import torch

    from ultrarag import Encoder

    encoder = Encoder.load(tiny_m3, adapter="bgem3", device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def test_the_gate_refuses_what_is_worse_unless_forced(live: LiveIndex, tiny_m3: str, quick_builds) -> None:
    live.add(corpus(60))
    gate = worse(live)
    new = live.build(scrambled(tiny_m3))
    with pytest.raises(GateError, match=r"significantly worse.*nDCG@10 1\.0000 -> 0\.\d+.*interval.*28 queries"):
        live.swap(new, gate, heads=["dense"])
    assert (live.status()["live"]["id"], live.generation(new).state) == (1, "ready")
    flip = live.swap(new, gate, force=True, heads=["dense"])
    assert flip.verdict is not None
    assert flip.verdict.worse
    recorded = read_status(live.path)["live"]
    assert (recorded["id"], recorded["forced"], recorded["metrics"]["old"]) == (2, True, 1.0)
    assert recorded["metrics"]["change"]["p_value"] < 0.05


def test_the_gate_lets_through_what_is_as_good(live: LiveIndex, other, quick_builds) -> None:
    live.add(corpus(40))
    gate = ({"q1": text_of(7)}, {"q1": {"p7": 1}})
    new = live.build(other)
    with pytest.raises(UsageError, match="need explicit weights"):
        live.swap(new, gate)
    with pytest.raises(UsageError, match="is a pair"):
        live.swap(new, {"q1": "x"}, heads=["dense"])  # type: ignore[arg-type]
    flip = live.swap(new, gate, weights={"dense": 1, "bm25": 1})
    assert not flip.new.forced
    assert flip.verdict is not None
    assert (flip.verdict.old, flip.verdict.new) == (1.0, 1.0)


def test_a_gate_that_judges_nothing_lets_nothing_through(live: LiveIndex, tiny_m3: str, quick_builds) -> None:
    live.add(Passage(f"doc{n}#0", text_of(n), metadata={"n": n}) for n in range(20))
    new = live.build(scrambled(tiny_m3))
    queries = {"q": text_of(7)}
    for wrong in ({"doc7": 1}, {"DOC7#0": 1, "doc8": 1}, {"doc7#0": 0}):
        with pytest.raises(DataError, match=r"none of the \d relevant passages is in the index|no passage is relevant"):
            live.swap(new, (queries, {"q": wrong}), heads=["dense"])
        with pytest.raises(DataError, match=r"none of the \d relevant passages is in the index|no passage is relevant"):
            live.evaluate(queries, {"q": wrong}, heads=["dense"])
    gate = (queries, {"q": ["doc7#0"]})
    options = {"heads": ["dense"], "filter": {"n": 3}}  # so that both models miss the passage
    with pytest.raises(GateError, match=r"nDCG@10 is 0 for it and for the live one"):
        live.swap(new, gate, **options)
    assert live.status()["live"]["id"] == 1
    assert live.swap(new, gate, force=True, **options).new.forced


def test_relevant_passages_that_are_missing_are_counted(live: LiveIndex, other, quick_builds) -> None:
    live.add(corpus(20))
    gate = ({"q1": text_of(7), "q2": "x"}, {"q1": {"p7": 1, "p8#1": 1}, "q2": {"p9#0": 1}})
    flip = live.swap(live.build(other), gate, heads=["dense"])
    wanted = "2 of 3 relevant passages are not in the index, 'p8#1' for one, and cannot be found; 1 of 2 queries"
    assert flip.verdict is not None
    assert wanted in flip.verdict.notes[0]
    assert wanted in live.evaluate(*gate, heads=["dense"]).notes[0]
    assert wanted in read_status(live.path)["live"]["metrics"]["notes"][0]


def test_an_unsound_generation_is_refused_even_by_force(live: LiveIndex, other, quick_builds, monkeypatch) -> None:
    from ultrarag.retrieve.engines.registry import open_backend

    live.add(corpus(10))
    new = live.build(other)
    directory = live.path / "generations" / "2" / "vectors"

    def change(act) -> None:
        backend = open_backend(directory)
        act(backend)
        backend.close()

    held = open_backend(directory)
    vectors = held.vectors(["p4", "p5"])
    held.close()
    change(lambda b: b.delete(["p4"]))
    with pytest.raises(GateError, match=r"not sound.*'p4'"):
        live.swap(new, force=True)
    change(lambda b: b.upsert(["p4"], vectors[1:], [{}]))
    with pytest.raises(GateError, match="stored for passage 'p4' is not the one"):
        live.swap(new, force=True)
    change(lambda b: b.upsert(["p4", "extra"], vectors, [{}, {}]))
    with pytest.raises(GateError, match="vectors of 11 passages, the index has 10"):
        live.swap(new, force=True)
    long = vectors[:1]
    long.dense = long.dense * 2
    change(lambda b: (b.delete(["extra"]), b.upsert(["p4"], long, [{}])))
    with pytest.raises(GateError, match=r"length 2\.000 instead of 1"):
        live.swap(new, force=True)
    assert live.status()["live"]["id"] == 1
    change(lambda b: b.upsert(["p4"], vectors[:1], [{"n": 4, "even": True}]))
    live.swap(new)


def test_states_that_cannot_be_swapped(live: LiveIndex, other, quick_builds) -> None:
    live.add(corpus(3))
    with pytest.raises(IndexStateError, match="no previous generation"):
        live.rollback()
    with pytest.raises(IndexStateError, match=r"no generation 7; it has 1 \(live\)"):
        live.swap(7)
    with pytest.raises(IndexStateError, match="is live, not ready: it is live already"):
        live.swap(1)
    new = live.build(other)
    assert live.build(other) == new  # ready already
    live.discard(new)
    with pytest.raises(IndexStateError, match="is retired"):
        live.swap(new)
    with pytest.raises(IndexStateError, match="is live; only"):
        live.discard(1)


def test_vacuum_removes_what_no_generation_needs(live: LiveIndex, other, quick_builds) -> None:
    live.add(corpus(30))
    for _ in range(2):
        live.swap(live.build(other))
    live.delete([f"p{n}" for n in range(20)])
    live.vacuum()
    assert sorted(path.name for path in (live.path / "generations").iterdir()) == ["2", "3"]
    assert live.generation(1).state == "retired"
    live.rollback()
    live.vacuum()
    with live._core.store.database.reading() as db:
        assert db.execute("SELECT count(*) FROM log").fetchone()[0] == 0
        assert db.execute("SELECT count(*) FROM passages").fetchone()[0] == 10
    assert_complete(live, 10)
    live.add(corpus(12))
    assert_complete(live, 22)


def test_searches_and_writes_go_on_while_everything_changes(live: LiveIndex, other, tiny, quick_builds) -> None:
    live.add(corpus(40))
    errors: list[BaseException] = []
    stop = threading.Event()
    done = {"searches": 0, "writes": 0}

    def searching() -> None:
        while not stop.is_set():
            hits = live.search(text_of(7), k=3, weights={"dense": 1, "bm25": 1})
            assert len(hits) == 3
            done["searches"] += 1

    def writing() -> None:
        n = 1000
        while not stop.is_set():
            live.add(corpus(2, start=n))
            live.delete([f"p{n}"])
            done["writes"], n = done["writes"] + 1, n + 2

    def guarded(work) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (searching, searching, writing)]
    for thread in threads:
        thread.start()
    try:
        live.swap(live.build(other))
        live.rollback()
        live.swap(live.build(tiny))
        live.vacuum()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert min(done.values()) > 3
    assert_complete(live, 40 + done["writes"])


def test_a_search_keeps_the_pair_that_it_began_with(live: LiveIndex, other, quick_builds, monkeypatch) -> None:
    live.add(corpus(10))
    new, old = live.build(other), live._core.live
    begun, go_on, found = threading.Event(), threading.Event(), []
    encode = old.encoder.encode_tokens

    def slow(*args, **options):
        begun.set()
        assert go_on.wait(30)
        return encode(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(old.encoder, "encode_tokens", slow)
        searcher = threading.Thread(target=lambda: found.extend(live.search("old castle", heads=["dense"])))
        searcher.start()
        assert begun.wait(30)
        swapper = threading.Thread(target=live.swap, args=(new,))
        swapper.start()
        while live.fingerprint != other.fingerprint:
            time.sleep(0.01)
        assert live.search("old castle", heads=["dense"])  # the new pair answers, the old one is still in use
        assert swapper.is_alive()
        go_on.set()
        searcher.join()
        swapper.join()
    assert len(found) == 10
    with pytest.raises(IndexStateError, match="closed"):
        old.backend.count()


# The real builder process


def test_a_real_build_in_its_own_process(tmp_path: Path, minilm_encoder, other) -> None:
    """On the default engine, from one model to another with other heads, resumed after its builder was killed."""
    with LiveIndex.create(tmp_path / "kb", minilm_encoder) as live:
        assert live.status()["live"]["backend"] == default_backend()
        live.add(corpus(30))
        assert "library" in live.search("a place with many books where nobody speaks", k=1)[0].passage.text
        killer = threading.Thread(target=kill_the_builder, args=(live,))
        killer.start()
        with pytest.raises(IndexStateError, match=r"killed by signal 9; what it committed is kept"):
            live.build(other)
        killer.join()
        unfinished = live.status()["generations"][1]
        assert (unfinished["state"], live.status()["live"]["id"]) == ("building", 1)
        assert "encoded" in unfinished["progress"]
        new = live.build(other, progress=False)
        assert (new.id, new.heads) == (2, ("dense", "sparse", "colbert"))
        live.add(corpus(2, start=30))
        live.swap(new, ({"q": corpus(8)[7].text}, {"q": {"p7": 1}}), weights={"dense": 1, "bm25": 1})
        assert_complete(live, 32)
        live.rollback()
        assert_complete(live, 32)


def kill_the_builder(live: LiveIndex) -> None:
    while live._core.builder is None:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(live._core.builder.pid, signal.SIGKILL)


def test_an_error_of_the_builder_is_raised_here(live: LiveIndex, other, monkeypatch) -> None:
    live.add(corpus(3))
    prepare = sources.prepare

    def spoiled(layout, generation, source) -> None:
        prepare(layout, generation, source)
        (layout.checkpoint(layout.directory(generation.id)) / "model.safetensors").unlink()

    monkeypatch.setattr("ultrarag.retrieve.build.start.prepare", spoiled)
    with pytest.raises(CheckpointError, match=r"building generation 2: .*model\.safetensors"):
        live.build(other)
