"""Mining: the same candidates as brute force, every filter by numbers, and files that a kill does not spoil."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from ultrarag.data.commands import run_mine as main
from ultrarag.errors import DataError, UsageError
from ultrarag.io.vectors import Vectors
from ultrarag.mining import miner as miner_module
from ultrarag.mining import pool as pool_module
from ultrarag.mining import search
from ultrarag.mining.choice import MiningSettings
from ultrarag.mining.miner import mine_files as mine_in_files
from ultrarag.retrieve import mine
from ultrarag.retrieve.bm25.index import BM25
from ultrarag.rows.row import parse_row

WORDS = ["vector", "database", "stores", "finds", "nearest", "seals", "sleep", "water", "bread", "oven", "steam"]
WORDS += ["dough", "rises", "bicycle", "chain", "oil"]
M3 = {"dense": 1.0, "sparse": 0.3, "colbert": 1.0}


def texts(count, seed=0, words=9):
    rng = random.Random(seed)
    return list(dict.fromkeys(" ".join(rng.choices(WORDS, k=words)) for _ in range(count)))


POOL = texts(60)
ROWS = [{"query": text, "pos": [POOL[3 * number]]} for number, text in enumerate(texts(8, 1, 5))]


def brute_force(encoder, weights):
    """(queries, pool): the weighted scores of everything, by the encoder alone."""
    queries = encoder.encode([row["query"] for row in ROWS], "query", progress=False)
    return encoder.similarity(queries, encoder.encode(POOL, progress=False), weights)


def expected(scores, low, high):
    """Per row, what ranks low to high hold besides its positive."""
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, low:high]
    return [
        [POOL[n] for n in order if POOL[n] != row["pos"][0]] for order, row in zip(ranked.tolist(), ROWS, strict=True)
    ]


def hardest(encoder, pool=POOL, rows=ROWS, **settings):
    chosen = {"range": (0, 60), "negatives": 60, "sampling": "hardest", "near_duplicate": None, **settings}
    return mine(rows, encoder, pool, **chosen)


@pytest.mark.parametrize("weights", [{"dense": 1}, {"sparse": 1}, M3], ids=lambda weights: "+".join(weights))
def test_all_candidates_come_in_the_order_of_brute_force(m3_encoder, monkeypatch, weights):
    monkeypatch.setattr("ultrarag.io.vectors.CHUNK_TEXTS", 7)  # so that chunks must be merged
    monkeypatch.setattr(search, "_CHUNK_QUERIES", 3)
    found = hardest(m3_encoder, weights=weights, write_scores=True)
    scores = brute_force(m3_encoder, weights)
    if weights == {"sparse": 1}:  # texts without a common token are no candidates
        scores[scores <= 0] = -np.inf
        wanted = [row[: len(mined["neg"])] for row, mined in zip(expected(scores, 0, 60), found.rows, strict=True)]
    else:
        wanted = expected(scores, 0, 60)
    for number, (row, want) in enumerate(zip(found.rows, wanted, strict=True)):
        given = [scores[number, POOL.index(text)] for text in row["neg"]]
        assert set(row["neg"]) == set(want)
        np.testing.assert_allclose(row["neg_scores"], given, atol=1e-5)
        assert row["neg_scores"] == sorted(row["neg_scores"], reverse=True)
        np.testing.assert_allclose(row["pos_scores"], [scores[number, 3 * number]], atol=1e-5)
        parse_row(row, teacher=True)


def test_a_range_is_of_ranks_with_positives_counted(m3_encoder):
    found = hardest(m3_encoder, range=(5, 15))
    assert [row["neg"] for row in found.rows] == expected(brute_force(m3_encoder, {"dense": 1.0}), 5, 15)
    assert {counts["candidates"] for counts in found.counts} == {10}


def test_colbert_alone_orders_the_candidates_of_the_dense_head(m3_encoder):
    found = hardest(m3_encoder, weights={"colbert": 1}, range=(0, 10), negatives=10)
    dense, colbert = (brute_force(m3_encoder, {head: 1.0}) for head in ("dense", "colbert"))
    for number, row in enumerate(found.rows):
        candidates = np.argsort(-dense[number], kind="stable")[:10]
        order = [POOL[n] for n in candidates[np.argsort(-colbert[number][candidates], kind="stable")]]
        assert row["neg"] == [text for text in order if text not in ROWS[number]["pos"]]


def test_bm25_needs_no_model_and_knows_positives_outside_the_pool(tmp_path):
    pool = [text for text in POOL if text != POOL[0]]
    found = hardest(None, pool, weights={"bm25": 1}, write_scores=True, negatives=5)
    with_all = BM25.create(tmp_path / "words")
    with_all.upsert([str(n) for n in range(len(POOL))], [*pool, POOL[0]], [{}] * len(POOL))
    hits = with_all.search(ROWS[0]["query"], 60)
    order = [[*pool, POOL[0]][int(id)] for id, _ in hits]
    assert found.rows[0]["neg"] == [text for text in order if text != POOL[0]][:5]
    assert found.rows[0]["pos_scores"] == pytest.approx(with_all.score(ROWS[0]["query"], ["59"]).tolist())
    with_all.close()


def test_minmax_puts_heads_of_different_scale_side_by_side(m3_encoder):
    raw = {head: hardest(m3_encoder, weights={head: 1}, write_scores=True).rows for head in ("dense", "bm25")}
    found = hardest(m3_encoder, weights={"dense": 1, "bm25": 2}, fusion="minmax", write_scores=True)
    for number, row in enumerate(found.rows):
        total = np.zeros(len(POOL))
        for head, weight in (("dense", 1), ("bm25", 2)):
            one, scores = raw[head][number], np.zeros(len(POOL))
            for text, score in zip([*one["pos"], *one["neg"]], [*one["pos_scores"], *one["neg_scores"]], strict=True):
                scores[POOL.index(text)] = score
            total += weight * (scores - scores.min()) / (scores.max() - scores.min())
        np.testing.assert_allclose(row["neg_scores"], [total[POOL.index(text)] for text in row["neg"]], atol=1e-5)


def test_margins_are_measured_from_the_lowest_positive(m3_encoder):
    scores = brute_force(m3_encoder, {"dense": 1.0})
    rows = [{"query": row["query"], "pos": [*row["pos"], POOL[50]]} for row in ROWS]
    lowest = np.minimum(scores[np.arange(len(ROWS)), 3 * np.arange(len(ROWS))], scores[:, 50])
    for settings, limit in (
        ({"margin": 0.02}, lowest - 0.02),
        ({"max_share": 0.9}, lowest - 0.1 * np.abs(lowest)),
        ({"margin": 0.02, "max_share": 0.9}, np.minimum(lowest - 0.02, lowest - 0.1 * np.abs(lowest))),
    ):
        found = hardest(m3_encoder, rows=rows, **settings)
        for number, row in enumerate(found.rows):
            allowed = {POOL[n] for n in np.flatnonzero(scores[number] <= limit[number])} - set(row["pos"])
            assert set(row["neg"]) == allowed
            counts = found.counts[number]
            assert counts.get("margin", 0) == 60 - 2 - len(allowed)
            assert counts["candidates"] == 60
    assert found.report.counts["margin"] == sum(counts.get("margin", 0) for counts in found.counts)
    assert sum(found.report.margins.before) == 58 * len(ROWS)
    assert sum(found.report.margins.after) == found.report.counts["chosen"]


def test_a_share_of_a_negative_score_lies_below_it():
    settings = MiningSettings(max_share=0.9)
    assert settings.limit(-1.0) == pytest.approx(-1.1)
    assert settings.limit(1.0) == pytest.approx(0.9)


def test_positives_and_queries_are_no_negatives_however_they_are_written(minilm_encoder):
    near = "Milvus is a fast open vector database for search over embeddings of all kinds today"
    pool = [
        "MILVUS is a  vector database.",  # the positive, but for case and space
        "What is Milvus?",  # the query
        "Milvus, a database.",  # a positive of the same query in another row
        near,  # nearly a positive of the third row
        near.replace("today", "now"),
        "Kites are birds.",
        "kites ARE birds.",  # the same text again
    ]
    rows = [
        {"query": "what is milvus?", "pos": ["Milvus is a vector database."], "neg": ["old"], "neg_scores": [1.0]},
        {"query": "What is milvus?", "pos": ["Milvus, a database."], "id": 7},
        {"query": "fast search?", "pos": [near]},
    ]
    found = mine(rows, minilm_encoder, pool, range=(0, 9), negatives=9, sampling="hardest")
    assert [set(row["neg"]) for row in found.rows] == [
        {near, pool[4], pool[5]},
        {near, pool[4], pool[5]},
        {pool[0], pool[1], pool[2], pool[5]},
    ]
    assert found.counts[0] | {"query": "", "positive_score": 0} == {
        "row": 1, "query": "", "positive_score": 0, "candidates": 6, "positive": 2, "chosen": 3,
    } | {"query": "", "positive_score": 0}  # fmt: skip
    assert found.counts[2]["near_duplicate"] == 1
    assert found.rows[1]["id"] == 7
    assert "neg_scores" not in found.rows[0]
    assert (found.report.pool, found.report.repeated) == (6, 1)


class Judge:
    """A reranker whose score is a number in the text."""

    def __init__(self, scores):
        self.scores, self.pairs = scores, []

    def score(self, pairs, progress=None):
        self.pairs += pairs
        return [self.scores[text] for _, text in pairs]


def test_what_the_reranker_refuses_is_replaced(m3_encoder):
    order = expected(brute_force(m3_encoder, {"dense": 1.0}), 0, 60)[0]
    scores = dict.fromkeys(POOL, -5.0) | {order[0]: 3.0, order[2]: 1.5, ROWS[0]["pos"][0]: 2.0}
    judge = Judge(scores)
    options = {"reranker": judge, "rows": ROWS[:1], "negatives": 3, "write_scores": True}
    found = hardest(m3_encoder, veto_above=2.5, **options)
    assert found.rows[0]["neg"] == [order[1], order[2], order[3]]
    assert (found.rows[0]["pos_scores"], found.rows[0]["neg_scores"]) == ([2.0], [-5.0, 1.5, -5.0])
    assert found.counts[0]["reranker"] == 1
    assert len(judge.pairs) == 5  # the positive, three that were drawn, and one more
    found = hardest(m3_encoder, veto_margin=1.0, **options)
    assert found.rows[0]["neg"] == [order[1], order[3], order[4]]


def test_a_veto_needs_a_reranker(m3_encoder):
    with pytest.raises(UsageError, match="give a reranker"):
        hardest(m3_encoder, veto_above=0.5)


def test_random_draws_depend_on_the_seed_alone(m3_encoder, monkeypatch):
    first = hardest(m3_encoder, sampling="random", negatives=5, range=(0, 30), seed=1).rows
    monkeypatch.setattr(miner_module, "CHUNK_ROWS", 3)
    assert hardest(m3_encoder, sampling="random", negatives=5, range=(0, 30), seed=1).rows == first
    other = hardest(m3_encoder, sampling="random", negatives=5, range=(0, 30), seed=2).rows
    assert other != first
    inside = expected(brute_force(m3_encoder, {"dense": 1.0}), 0, 30)
    assert all(set(row["neg"]) <= set(want) for row, want in zip(first, inside, strict=True))


def test_rows_are_their_own_pool_and_can_be_filled_up(m3_encoder):
    found = mine(ROWS, m3_encoder, range=(0, 2), negatives=4, near_duplicate=None, fill_random=True)
    positives = {row["pos"][0] for row in ROWS}
    assert found.report.pool == len(ROWS)
    for row in found.rows:
        assert len(set(row["neg"])) == 4
        assert set(row["neg"]) <= positives - set(row["pos"])
    assert found.report.counts["filled"] > 0


def test_a_row_is_asked_with_its_own_prompt(m3_encoder):
    prompted = [{**row, "prompt": "seals sleep "} for row in ROWS]
    mixed = [prompted[0], ROWS[1], *prompted[2:]]
    plain, both = hardest(m3_encoder, write_scores=True), hardest(m3_encoder, rows=mixed, write_scores=True)
    told = hardest(
        m3_encoder, rows=[{**row, "query": "seals sleep " + row["query"]} for row in ROWS], write_scores=True
    )
    assert both.rows[1] == plain.rows[1]
    assert both.rows[0]["neg_scores"] == pytest.approx(told.rows[0]["neg_scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"dens": 1}}, "did you mean 'dense'"),
        ({"weights": {"dense": 0}}, "at least one head"),
        ({"range": (60, 70)}, "the pool has 60 texts"),
        ({"range": (5, 5)}, "FIRST-LAST"),
        ({"max_share": 1.5}, "max_share"),
        ({"fill_random": True, "write_scores": True}, "leave out one"),
        ({"margn": 1}, "did you mean 'margin'"),
    ],
)
def test_settings_that_cannot_be_used(m3_encoder, settings, message):
    with pytest.raises(UsageError, match=message):
        hardest(m3_encoder, **settings)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text} for text in POOL])
    return write_lines(tmp_path / "train.jsonl", ROWS), pool, tmp_path / "mined.jsonl"


SETTINGS = MiningSettings(range=(0, 30), negatives=4, weights={"dense": 1.0, "bm25": 0.1})


def test_a_run_killed_when_it_had_published_is_done_by_the_same_call(files, m3_encoder, killed_when_published):
    rows, pool, output = files

    def call():
        return mine_in_files(rows, output, m3_encoder, SETTINGS, candidate_pool=pool)

    killed_when_published(call)
    (path_of(output, ".mining") / "mining.json").unlink()  # the kill came while the folder was removed
    before = {name: path_of(output, name).read_bytes() for name in ("", ".counts.jsonl")}
    report = call()
    assert {name: path_of(output, name).read_bytes() for name in before} == before
    assert json.loads(path_of(output, ".report.json").read_text()) == report.to_dict()
    assert report.rows == len(ROWS)
    assert len(list(output.parent.glob("mined*"))) == 3


def test_a_stopped_run_goes_on_and_encodes_nothing_twice(files, m3_encoder, monkeypatch):
    rows, pool, output = files
    monkeypatch.setattr(pool_module, "CHUNK_TEXTS", 16)
    options = {"candidate_pool": pool, "chunk_rows": 3}
    mine_in_files(rows, output, m3_encoder, SETTINGS, **options)
    whole = {name: path_of(output, name).read_text() for name in ("", ".counts.jsonl")}
    report = json.loads(path_of(output, ".report.json").read_text())
    for path in output.parent.glob("mined.jsonl*"):
        path.unlink()

    encoded = []
    kept = m3_encoder.encode_tokens

    def encode(tokens, *args, **more):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(tokens))
        return kept(tokens, *args, **more)

    monkeypatch.setattr(m3_encoder, "encode_tokens", encode)
    with pytest.raises(KeyboardInterrupt):  # while the pool is encoded
        mine_in_files(rows, output, m3_encoder, SETTINGS, **options)
    encoded.clear()
    monkeypatch.setattr(m3_encoder, "encode_tokens", lambda *a, **k: (encoded.append(len(a[0])), kept(*a, **k))[1])
    mined, first = miner_module.Miner.mine, []
    monkeypatch.setattr(
        miner_module.Miner, "mine", lambda *a: mined(*a) if first.append(1) or len(first) < 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):  # while rows are mined
        mine_in_files(rows, output, m3_encoder, SETTINGS, **options)
    monkeypatch.setattr(miner_module.Miner, "mine", mined)
    mine_in_files(rows, output, m3_encoder, SETTINGS, **options)
    assert sum(encoded) == 60 - 32 + len(ROWS)  # the texts that were left, and each query once
    assert {name: path_of(output, name).read_text() for name in whole} == whole
    again = json.loads(path_of(output, ".report.json").read_text())
    assert {**again, "seconds": 0} == {**report, "seconds": 0}
    assert sorted(path.name for path in output.parent.glob("mined*")) == [
        "mined.jsonl", "mined.jsonl.counts.jsonl", "mined.jsonl.report.json",
    ]  # fmt: skip


def test_kill_9_while_the_pool_is_encoded(files, tiny_m3, m3_encoder, monkeypatch):
    rows, pool, output = files
    many = texts(1_500, words=30)
    write_lines(pool, [{"text": text} for text in many])
    small = "import sys; from ultrarag.mining import pool; pool.CHUNK_TEXTS = 8\n"
    small += "from ultrarag.data.cli import main; main(['mine', *sys.argv[1:]])"
    flags = f"--input_file {rows} --output_file {output} --candidate_pool {pool} --range_for_sampling 0-30"
    flags += f" --model_name_or_path {tiny_m3} --adapter bgem3"
    child = subprocess.Popen([sys.executable, "-c", small, *flags.split()])
    state = path_of(output, ".mining") / "vectors.json"
    while not state.is_file() and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    kept = json.loads(state.read_text())["rows"]
    assert 0 < kept < len(many)
    encoded = []
    encode = m3_encoder.iter_encode
    monkeypatch.setattr(
        m3_encoder, "iter_encode", lambda t, k, **o: encode((encoded.append(k) or x for x in t), k, **o)
    )
    report = mine_in_files(rows, output, m3_encoder, MiningSettings(range=(0, 30)), candidate_pool=pool)
    assert report.pool == len(many)
    assert encoded.count("passage") == len(many) + len(ROWS) - kept


def path_of(output, name):
    return output.with_name(output.name + name)


def test_vectors_that_were_not_committed_are_forgotten(tmp_path, m3_encoder):
    everything = m3_encoder.encode(POOL, progress=False)
    held = Vectors(tmp_path, m3_encoder.heads)
    held.append(everything[:20])
    held.commit()
    held.append(everything[20:25])  # a kill comes here
    held.close()
    with (tmp_path / "dense.bin").open("ab") as file:
        file.write(b"half a row")
    held = Vectors(tmp_path, m3_encoder.heads)
    assert held.rows == 20
    held.append(everything[20:])
    for head in m3_encoder.heads:
        found, wanted = held.gather(np.array([59, 0, 20, 19]), head), everything[np.array([59, 0, 20, 19])]
        if head == "sparse":
            assert found.sparse.to_dicts() == wanted.sparse.to_dicts()
        else:
            width = getattr(found, head).shape[1]
            np.testing.assert_array_equal(getattr(found, head), getattr(wanted, head)[:, :width])
    held.close()


def test_a_kept_folder_serves_other_settings_and_no_other_pool(files, m3_encoder, monkeypatch):
    rows, pool, output = files
    options = {"candidate_pool": pool, "work_dir": output.parent / "vectors"}
    mine_in_files(rows, output, m3_encoder, SETTINGS, **options)
    monkeypatch.setattr(m3_encoder, "iter_encode", lambda texts, *a, **k: iter(list(texts) and 1 / 0))
    monkeypatch.setattr(miner_module.MiningSearch, "_encoded", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # at the queries: the pool is there
        mine_in_files(rows, path_of(output, "2"), m3_encoder, MiningSettings(weights=SETTINGS.weights), **options)
    write_lines(pool, [{"text": text} for text in POOL[1:]])
    with pytest.raises(DataError, match="another pool"):
        mine_in_files(rows, path_of(output, "3"), m3_encoder, SETTINGS, **options)


def test_a_live_index_gives_its_passages_and_vectors(tmp_path, m3_encoder, monkeypatch):
    from ultrarag.retrieve import LiveIndex

    rows = write_lines(tmp_path / "train.jsonl", [*ROWS, {"query": "steam", "pos": ["bread rises in steam"]}])
    pool = write_lines(tmp_path / "pool.jsonl", [{"text": text} for text in POOL])
    settings = MiningSettings(range=(0, 60), negatives=8, weights=M3)
    mine_in_files(rows, tmp_path / "a.jsonl", m3_encoder, settings, candidate_pool=pool)
    with LiveIndex.create(tmp_path / "kb", m3_encoder, backend="numpy") as live:
        live.add({"id": f"{number % 2}-{number}", "text": text} for number, text in enumerate([*POOL, POOL[0]]))
        encoded = []
        kept = m3_encoder.iter_encode
        monkeypatch.setattr(
            m3_encoder, "iter_encode", lambda t, k, **o: kept((encoded.append((k, x)) or x for x in t), k, **o)
        )
        mine_in_files(rows, tmp_path / "b.jsonl", m3_encoder, settings, live=live)
    assert [text for kind, text in encoded if kind == "passage"] == ["bread rises in steam"]
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


@pytest.mark.parametrize(
    ("positive", "passage"),
    [
        ("Milvus is a vector database.", "Milvus\nMilvus is a vector database."),
        ("Milvus\nMilvus is a vector database.", "Milvus is a vector database."),
        ("MILVUS  is a vector database.", "About it\nMilvus is a vector\ndatabase."),
        ("Qdrant\nMilvus is a vector database.", "Milvus\nMilvus is a vector database."),
    ],
)
def test_a_positive_is_known_with_and_without_its_title(minilm_encoder, positive, passage):
    rows = [{"query": "what is milvus?", "pos": [positive]}]
    pool = [passage, "A page\nWhat is  Milvus?", "Kites are birds."]
    settings = {"range": (0, 3), "negatives": 3, "near_duplicate": None}
    found = mine(rows, minilm_encoder, pool, sampling="hardest", **settings)
    assert found.rows[0]["neg"] == ["Kites are birds."]
    assert found.counts[0]["positive"] == found.counts[0]["query"] == 1


@pytest.mark.parametrize("near", [None, 0.8])
@pytest.mark.parametrize(
    "positive", ["Milvus. It is a database.", "Milvus: it is a database", "Milvus - It is a database!"]
)
def test_a_positive_is_known_however_it_was_joined_with_its_title(minilm_encoder, positive, near):
    rows = [{"query": "what is milvus?", "pos": [positive]}]
    pool = ["Milvus\nIt is a database.", "Kites are birds."]
    found = mine(rows, minilm_encoder, pool, range=(0, 2), negatives=2, near_duplicate=near)
    assert (found.rows[0]["neg"], found.counts[0]["near_duplicate"]) == (["Kites are birds."], 1)


def test_a_near_duplicate_is_known_with_and_without_its_title(minilm_encoder):
    text = "milvus is a fast open vector database for search over embeddings of all kinds"
    title = "a title of seven words and one"
    rows = [{"query": "what is milvus?", "pos": [f"{text} today"]}]
    found = mine(rows, minilm_encoder, [f"{title}\n{text} now", "Kites are birds."], range=(0, 2), negatives=2)
    assert (found.rows[0]["neg"], found.counts[0]["near_duplicate"]) == (["Kites are birds."], 1)


@pytest.mark.parametrize("blank", ["", " \n", "\u200b\ufeff"])
def test_blank_candidates_are_left_out_and_counted(files, m3_encoder, caplog, blank):
    rows, pool, output = files
    write_lines(pool, [{"text": blank}, {"text": blank, "title": "a title alone"}, *({"text": text} for text in POOL)])
    report = mine_in_files(rows, output, m3_encoder, SETTINGS, candidate_pool=pool)
    assert report.pool == len(set(POOL)) + 1
    assert "1 blank passages of" in caplog.text
    mine(ROWS, m3_encoder, [blank, *POOL], range=(0, 10), negatives=1)
    assert "1 blank passages of the pool" in caplog.text


def test_bad_rows_and_candidates_name_their_line(files, m3_encoder):
    rows, pool, output = files
    write_lines(pool, [{"text": "a"}, {"txt": "b"}])
    with pytest.raises(DataError, match=r"pool\.jsonl:2: .*'text'"):
        mine_in_files(rows, output, m3_encoder, SETTINGS, candidate_pool=pool)
    write_lines(rows, [ROWS[0], {"query": "q"}])
    with pytest.raises(DataError, match=r"train\.jsonl:2: 'pos' is missing"):
        mine_in_files(rows, output, m3_encoder, SETTINGS, overwrite=True)


def test_the_command_line_of_hn_mine(files, minilm, capsys):
    rows, pool, output = files
    flags = f"--input_file {rows} --output_file {output} --candidate_pool {pool} --range_for_sampling 2-40"
    flags += f" --negative_number 3 --use_gpu_for_searching False --embedder_name_or_path {minilm}"
    flags += " --embedder_model_class encoder-only-base --embedder_query_max_length 32 --batch_size 256"
    flags += " --embedder_passage_max_length 64 --normalize_embeddings True --use_fp16 True --pooling_method mean"
    words = [*flags.split(), "--query_instruction_for_retrieval", "Find: ", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["rows"], printed["counts"]["chosen"], printed["pool"]) == (8, 24, 60)
    assert [len(json.loads(line)["neg"]) for line in output.read_text().splitlines()] == [3] * 8


def test_wrong_flags_are_refused_with_what_to_do():
    with pytest.raises(UsageError, match="did you mean '--negative_number'"):
        main(["--input_file", "a", "--output_file", "b", "--negative_numbers", "3"])
    with pytest.raises(UsageError, match="--model_name_or_path"):
        main(["--input_file", "a", "--output_file", "b"])
    with pytest.raises(UsageError, match="FIRST-LAST"):
        main(["--input_file", "a", "--output_file", "b", "--range_for_sampling", "10"])


def test_the_module_runs_and_its_help_is_light():
    code = "import runpy, sys\nsys.argv = ['mine', '--help']\n"
    code += "try: runpy.run_module('ultrarag.retrieve.mine', None, '__main__')"
    code += "\nexcept SystemExit as end: print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--candidate_pool" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"
