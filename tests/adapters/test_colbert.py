"""Late interaction: the three layouts, equal to sentence-transformers, trained, saved as they came, and indexed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import forked
from ultrarag import Encoder
from ultrarag.encoder import find_adapter
from ultrarag.encoder.pooling import merged
from ultrarag.errors import GateError, UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.retrieve.swap import check_sound
from ultrarag.scores import colbert_scores
from ultrarag.testing.tiny import TEXTS
from ultrarag.testing.tiny_colbert import COLBERT_LAYOUTS, PASSAGE_LENGTH, QUERY_LENGTH, WIDTH, tiny_colbert
from ultrarag.types import Passage

#: Among them: punctuation alone, markers inside, one that fills the query, and one that is cut.
ODD = [*TEXTS, "hi", "a, b; c!", "What is a [MASK] [Q] thing?", "Seals " * 90]
ROWS = [{"query": TEXTS[i], "pos": [TEXTS[i + 1]], "neg": [TEXTS[(i + 3) % 8]]} for i in range(0, 8, 2)]
SCORED = [{**row, "pos_scores": [2.0], "neg_scores": [0.5]} for row in ROWS]
RUN = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "train_group_size": 2,
    "query_max_len": 64,
    "passage_max_len": 64,
    "use_cpu": True,
    "skip_data_check": True,
    "disable_tqdm": True,
}


@pytest.fixture(params=COLBERT_LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    tiny_colbert(path, request.param)
    return path


def vectors(encoder: Encoder, kind: str) -> list[np.ndarray]:
    found = encoder.encode(ODD, kind, progress=False)
    return [row[mask.astype(bool)] for row, mask in zip(found.colbert, found.mask, strict=True)]


def assert_equal_to_library(path: Path) -> None:
    from sentence_transformers import MultiVectorEncoder

    encoder, library = Encoder.load(path, device="cpu"), MultiVectorEncoder(str(path), device="cpu")
    for kind, encode in {"query": library.encode_query, "passage": library.encode_document}.items():
        for ours, theirs in zip(vectors(encoder, kind), encode(ODD, show_progress_bar=False), strict=True):
            np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-5)


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("layout", COLBERT_LAYOUTS)
def test_equal_to_sentence_transformers(layout: str, attend: bool, tmp_path: Path) -> None:
    tiny_colbert(tmp_path, layout, attend)
    assert find_adapter(tmp_path) == "colbert"
    assert_equal_to_library(tmp_path)


def test_how_texts_are_read(folder: Path) -> None:
    encoder = Encoder.load(folder, device="cpu")
    queries, passages = vectors(encoder, "query"), vectors(encoder, "passage")
    assert {len(rows) for rows in queries} == {QUERY_LENGTH}  # filled with mask tokens, or cut
    assert max(map(len, passages)) == PASSAGE_LENGTH
    plain, stopped = (encoder.encode([text], progress=False).mask.sum() for text in ("hi", "hi, . ?"))
    assert plain == stopped  # punctuation is not compared
    assert queries[0].shape[1] == WIDTH


@pytest.mark.parametrize("more", [{}, {"use_lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_saved_in_the_layout_it_came_in(folder: Path, more: dict, tmp_path: Path) -> None:
    result = finetune(str(folder), ROWS, tmp_path / "out", **RUN, **more)
    before, after = (
        {path.relative_to(root).as_posix() for path in root.rglob("*")} for root in (folder, Path(result.checkpoint))
    )
    assert before <= after
    for name in ("modules.json", "artifact.metadata", "config_sentence_transformers.json", "tokenizer.json"):
        if (folder / name).is_file():
            assert (Path(result.checkpoint) / name).read_bytes() == (folder / name).read_bytes()
    first = vectors(Encoder.load(folder, device="cpu"), "query")[0]
    assert np.abs(vectors(Encoder.load(result.checkpoint, device="cpu"), "query")[0] - first).max() > 1e-4
    assert_equal_to_library(Path(result.checkpoint))


def test_distilled_in_pieces(tmp_path: Path) -> None:
    tiny_colbert(tmp_path)
    alone, taught = (
        vectors(Encoder.load(finetune(str(tmp_path), SCORED, tmp_path / name, **RUN, **more).checkpoint), "query")[0]
        for name, more in {"alone": {}, "taught": {"knowledge_distillation": True}}.items()
    )
    assert np.abs(alone - taught).max() > 1e-4
    # that pieces give the same gradients is one of the conformance kit's checks
    assert finetune(str(tmp_path), SCORED, tmp_path / "pieces", knowledge_distillation=True, sub_batch_size=2, **RUN)


def test_what_is_refused(tmp_path: Path) -> None:
    tiny_colbert(tmp_path)
    with pytest.raises(UsageError, match=r"late-interaction.*use the adapter 'colbert'"):
        Encoder.load(tmp_path, adapter="bge", device="cpu")
    with pytest.raises(UsageError, match="head"):
        Encoder.load(tmp_path, heads=["dense"], device="cpu")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "", "type": "pylate.models.Other.Other"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UsageError, match=r"pylate\.models\.Other\.Other"):
        Encoder.load(tmp_path, adapter="colbert", device="cpu")


def test_reading_is_part_of_the_identity(tmp_path: Path) -> None:
    prints = []
    for number, change in enumerate(({}, {"skiplist_words": ["."]}, {"attend_to_expansion_tokens": True})):
        path = tmp_path / str(number)
        path.mkdir()
        tiny_colbert(path)
        file = path / "config_sentence_transformers.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        prints.append(Encoder.load(path, device="cpu").fingerprint)
    assert len(set(prints)) == 3


@pytest.mark.parametrize("layout", COLBERT_LAYOUTS)
def test_punctuation_that_is_no_token_leaves_unknown_words_compared(layout: str, tmp_path: Path) -> None:
    """As in sentence-transformers; Stanford's code and PyLate take the unknown token for it, and compare none."""
    tiny_colbert(tmp_path, layout)
    encoder = Encoder.load(tmp_path, device="cpu")
    tokenizer = encoder.tokenizer
    assert tokenizer.convert_tokens_to_ids(";") == tokenizer.unk_token_id  # what this is about
    assert tokenizer.unk_token_id not in encoder.model.skipped.tolist()
    counts = [int(encoder.encode([text], progress=False).mask.sum()) for text in ("seals ; \u2603", "seals")]
    assert counts[0] == counts[1] + 2
    assert_equal_to_library(tmp_path)


@pytest.mark.skipif(
    os.environ.get("ULTRARAG_LONG_TESTS") != "1", reason="set ULTRARAG_LONG_TESTS=1 for the tests that take minutes"
)
def test_passages_of_other_processes_are_negatives(tmp_path: Path) -> None:
    """Two processes with half of the rows each take the step of one with all of them."""
    tiny_colbert(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), **still}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    flags = ["--model_name_or_path", tmp_path / "model", "--train_data", rows, "--max_steps", 2, "--optim", "sgd"]
    flags += ["--learning_rate", 0.5, "--train_group_size", 2, "--query_max_len", 64, "--passage_max_len", 64]
    flags += ["--skip_data_check", True, "--negatives_cross_device", True, "--use_cpu", True, "--temperature", 1]
    flags += ["--lr_scheduler_type", "constant", "--bf16", False]
    found = {}
    for processes in (1, 2):
        out = ["--output_dir", tmp_path / str(processes), "--per_device_train_batch_size", 4 // processes]
        done = forked.torchrun(["-m", "ultrarag.finetune", *flags, *out], processes)
        assert done.returncode == 0, done.stderr
        found[processes] = Encoder.load(tmp_path / str(processes), device="cpu").encode(ODD, progress=False).colbert
    before = Encoder.load(tmp_path / "model", device="cpu").encode(ODD, progress=False).colbert
    assert np.abs(found[1] - before).max() > 1e-3
    np.testing.assert_allclose(found[2], found[1], atol=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "qdrant-edge", "plaid"])
def test_index_compares_with_all(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tiny_colbert(model)
    encoder = Encoder.load(model, device="cpu")
    same = [Passage(f"z{number}", "same words", metadata={"n": number}) for number in (3, 1, 2)]
    passages = [*(Passage(f"p{number}", text) for number, text in enumerate(TEXTS)), *same]
    sides = [
        encoder.encode(texts, kind, progress=False)
        for texts, kind in ((["same words"], "query"), (passages, "passage"))
    ]
    query, passage = ((torch.from_numpy(side.colbert), torch.from_numpy(side.mask)) for side in sides)
    wanted = dict(zip([item.id for item in passages], colbert_scores(*query, *passage)[0].tolist(), strict=True))
    with LiveIndex.create(tmp_path / "index", encoder, backend=backend) as index:
        index.add(passages)
        hits = index.search("same words", k=20)
        assert {hit.id for hit in hits} == set(wanted)  # most share no word with the query
        assert [hit.score for hit in hits] == pytest.approx([wanted[hit.id] for hit in hits], abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        assert [hit.id for hit in hits if hit.id[0] == "z"] == ["z1", "z2", "z3"]
        for k in range(1, 11):
            assert [hit.id for hit in index.search("same words", k=k)] == [hit.id for hit in hits[:k]]
        assert [hit.id for hit in index.search("same words", filter={"n": 2})] == ["z2"]
        monkeypatch.setattr("ultrarag.retrieve.search.searcher.MOST_COMPARED", 5)
        if backend == "plaid":  # which is for any number
            assert [hit.id for hit in index.search("same words", k=20)] == [hit.id for hit in hits]
            return
        with pytest.raises(UsageError, match=r"11 passages.*at most 5.*'bm25': 1"):
            index.search("same words")
        assert index.search("same words", weights={"colbert": 1, "bm25": 1}, k=1)[0].id == "z1"


def test_codes_are_built_swapped_and_searched_as_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one engine to another, whose vectors become codes; each generation keeps its own."""
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.engine.CODED_TOKENS", 300)
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.search.FEW", 10)
    model = tmp_path / "model"
    model.mkdir()
    tiny_colbert(model)
    words = " ".join(TEXTS).split()
    texts = [" ".join(words[(7 * row + 3 * word) % len(words)] for word in range(9)) for row in range(120)]
    passages = [Passage(f"p{row}", text, metadata={"n": row}) for row, text in enumerate(texts)]
    found = lambda: [hit.id for hit in index.search(texts[5], k=20)]  # noqa: E731
    with LiveIndex.create(tmp_path / "index", Encoder.load(model, device="cpu"), backend="numpy") as index:
        index.add(passages)
        exact = found()
        generation = index.build(model, backend="plaid?bits=4", progress=False)
        index.swap(generation)
        assert found() == exact  # few, as the builder sees it
        index.add([Passage("new", texts[5])])
        index.delete(["new", "p7"])  # from here on there are codes
        (file,) = tmp_path.glob("index/generations/*/vectors/coder-*")
        assert file.parts[-3] == str(generation.id)
        assert len(set(found()) & set(exact)) >= 16
        assert {hit.id for hit in index.search(texts[5], filter={"n": {"lt": 3}})} == {"p0", "p1", "p2"}
        assert len(index.search(texts[5], k=20, exact=True)) == 20
        core = index._core
        check_sound(core.live, core.store, core.store.last_seq())  # compares codes with codes
        core.live.backend.upsert(["p0"], core.live.backend.vectors(["p60"]), [{}])
        with pytest.raises(GateError, match="colbert vector stored for passage 'p0'"):
            check_sound(core.live, core.store, core.store.last_seq())
        core.live.backend.upsert(["p0"], core.live.encode_passages([texts[0]]), [{"n": 0}])
        second = index.build(model, backend="plaid?bits=2", share=False, progress=False)
        assert (second.backend, second.id) == ("plaid?bits=2&rest=8", generation.id + 1)
        index.swap(second)
        index.rollback()
        coded = found()
        assert len(set(coded) & set(exact)) >= 16
    with LiveIndex.open(tmp_path / "index") as index:
        assert index.status()["live"]["backend"] == "plaid?bits=4&rest=8"
        assert found() == coded
        assert index.searcher(generation.id).search(texts[5], k=20).generation == generation.id


def test_a_generation_of_before_there_were_refinements_keeps_its_name_and_its_next_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrarag.retrieve.engines.plaid.engine.CODED_TOKENS", 100)
    model = tmp_path / "model"
    model.mkdir()
    tiny_colbert(model)
    encoder = Encoder.load(model, device="cpu")
    rests = lambda: [path.parts[-3] for path in tmp_path.glob("index/generations/*/vectors/tokenrests-*")]  # noqa: E731
    with monkeypatch.context() as before:
        for place in ("engines.registry", "generation.open"):
            before.setattr(f"ultrarag.retrieve.{place}.settled", lambda name: name)
        with LiveIndex.create(tmp_path / "index", encoder, backend="plaid") as index:
            index.add([Passage(f"p{row}", f"{TEXTS[row % len(TEXTS)]} {row}") for row in range(60)])
            found = [(hit.id, hit.score) for hit in index.search(TEXTS[0], k=60)]
    with LiveIndex.open(tmp_path / "index") as index:
        assert index.status()["live"]["backend"] == "plaid"
        assert [(hit.id, hit.score) for hit in index.search(TEXTS[0], k=60)] == found
        index.add([Passage(f"late{row}", f"{TEXTS[row % len(TEXTS)]} {row}") for row in range(60)])
        assert rests() == []
        generation = index.build(model, backend="plaid", share=False, progress=False)
        assert generation.backend == "plaid?bits=2&rest=8"
        index.swap(generation)
        index.add([Passage(f"new{row}", f"{TEXTS[row % len(TEXTS)]} {row}") for row in range(60)])
        assert rests() == [str(generation.id)]


def test_a_generation_goes_live_and_back(tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("one", "two")]
    for seed, model in enumerate(models):
        model.mkdir()
        tiny_colbert(model, seed=seed)
    with LiveIndex.create(tmp_path / "index", Encoder.load(models[0], device="cpu"), backend="numpy") as index:
        index.add([Passage(str(number), text) for number, text in enumerate(TEXTS)])
        before = [(hit.id, hit.score) for hit in index.search("seals sleep")]
        index.swap(index.build(Encoder.load(models[1], device="cpu")))
        assert [(hit.id, hit.score) for hit in index.search("seals sleep")] != before
        index.rollback()
        assert [(hit.id, hit.score) for hit in index.search("seals sleep")] == before
        with pytest.raises(UsageError, match=r"learns by the stored dense vectors.*colbert"):
            index.refresh(ROWS, output_dir=tmp_path / "out", gate=False, effort="query", **RUN)


def test_pooled_passages_have_fewer_tokens_and_are_part_of_the_identity(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tiny_colbert(model)
    whole, half = (Encoder.load(model, device="cpu", token_pooling=factor) for factor in (None, 2))
    texts = [*TEXTS, "seals"]
    counts = [encoder.encode(texts, "passage", progress=False).mask.sum(1) for encoder in (whole, half)]
    assert counts[1].tolist() == [-(-count // 2) for count in counts[0].tolist()]
    queries = [encoder.encode(texts, "query", progress=False).colbert for encoder in (whole, half)]
    np.testing.assert_array_equal(*queries)
    found = half.encode(texts, "passage", progress=False)
    np.testing.assert_allclose(np.linalg.norm(found.colbert, axis=2), found.mask, atol=1e-5)
    assert whole.fingerprint != half.fingerprint
    again = Encoder.load(half.save(tmp_path / "saved"), device="cpu")
    assert again.fingerprint == half.fingerprint
    assert again.encode(texts, "passage", progress=False).mask.sum(1).tolist() == counts[1].tolist()
    with LiveIndex.create(tmp_path / "index", again, backend="plaid") as index:
        index.add([Passage(str(number), text) for number, text in enumerate(TEXTS)])
        assert index.add([Passage("0", TEXTS[0], metadata={"seen": True})]).metadata == 1
        held = index._core.live.backend.vectors(["0"])
        assert held.mask.sum() == counts[1][0]
        index.swap(index.build(half, share=False, progress=False))
    with pytest.raises(UsageError, match="token_pooling is 0"):
        Encoder.load(model, device="cpu", token_pooling=0)


def test_the_tokens_that_are_most_alike_become_one() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.99, 0.02], [0, 0.98], [-1, 0]], np.float32)
    np.testing.assert_allclose(merged(vectors, 2), [[0.995, 0.01], [0, 0.99], [-1, 0]], atol=1e-6)
    assert merged(vectors, 1).shape == (5, 2)
    assert merged(vectors, 9).shape == (1, 2)
    assert merged(vectors[:0], 2).shape == (0, 2)
    linkage = pytest.importorskip("scipy.cluster.hierarchy")
    many = np.random.default_rng(0).normal(size=(40, 6))
    places = linkage.fcluster(linkage.ward(many), 14, "maxclust")
    wanted = [many[places == place].mean(0) for place in np.unique(places)]
    found = merged(many, 3)
    np.testing.assert_allclose(found[np.lexsort(found.T)], np.array(wanted)[np.lexsort(np.array(wanted).T)], atol=1e-9)
