import json
import math
import subprocess
import sys

import numpy as np
import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.evaluation import ndcg_of_rows, read_beir, run_of, significance, top_k, write_beir
from ultrarag.evaluation.metrics import metrics, per_query
from ultrarag.types import Passage

CORPUS = [
    '{"_id": "d1", "title": "Title", "text": "one"}',
    '{"_id": 2, "title": "", "text": "二", "metadata": {"n": 1}}',
]
QUERIES = ['{"_id": "q1", "text": "first"}', '{"_id": "q2", "text": "second"}']
QRELS = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\t2\t0"]


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, split="test"):
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "corpus.jsonl").write_text("\n".join(corpus) + "\n", encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(queries) + "\n", encoding="utf-8")
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(qrels) + "\n", encoding="utf-8")
    return folder


# ---- BEIR folders


def test_read_beir_reads_passages_judged_queries_and_qrels(tmp_path):
    collection = read_beir(write(tmp_path))
    assert collection.corpus == {"d1": Passage("d1", "one", "Title"), "2": Passage("2", "二", "", {"n": 1})}
    assert [p.content for p in collection.corpus.values()] == ["Title\none", "二"]
    assert collection.queries == {"q1": "first"}
    assert collection.qrels == {"q1": {"d1": 1, "2": 0}}


def test_read_beir_takes_qrels_without_a_header(tmp_path):
    assert read_beir(write(tmp_path, qrels=QRELS[1:])).qrels == {"q1": {"d1": 1, "2": 0}}


def test_a_missing_split_names_those_there_are(tmp_path):
    write(tmp_path, split="train")
    write(tmp_path, split="dev")
    with pytest.raises(DataError, match=r"split 'test' .*: dev, train"):
        read_beir(tmp_path)


def test_a_folder_without_splits_or_no_folder_says_so(tmp_path):
    with pytest.raises(DataError, match="no splits at all"):
        read_beir(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        read_beir(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("part", "lines", "message"),
    [
        ("corpus", ["{", *CORPUS], r"corpus\.jsonl:1: not a JSON object"),
        ("corpus", ["[1]"], r"corpus\.jsonl:1: not a JSON object"),
        ("corpus", [CORPUS[0], "", '{"text": "x"}'], r"corpus\.jsonl:3: '_id': Field required"),
        ("corpus", [*CORPUS, '{"_id": "x", "text": null}'], r"corpus\.jsonl:3: 'text': .*string"),
        ("corpus", [*CORPUS, CORPUS[0]], r"corpus\.jsonl:3: '_id' 'd1' was used before, at .*corpus\.jsonl:1"),
        ("corpus", [""], r"corpus\.jsonl' holds no rows"),
        ("queries", ['{"_id": "q1", "text": " "}'], r"queries\.jsonl:1: 'text' is empty"),
        ("queries", ['{"_id": "", "text": "x"}'], r"queries\.jsonl:1: '_id' is empty"),
        ("qrels", [QRELS[0], "q1\td1"], r"test\.tsv:2: 2 fields"),
        ("qrels", [QRELS[0], "q1\td1\thigh"], r"test\.tsv:2: the relevance 'high' is not a whole number"),
        ("qrels", [QRELS[0], "q1\td1\t0.5"], r"test\.tsv:2: the relevance '0.5' is not a whole number"),
        ("qrels", ["q1\td1\t0.5"], r"test\.tsv:1: the relevance '0.5' is not a whole number"),
        ("qrels", [QRELS[0], "q9\td1\t1"], r"test\.tsv:2: query 'q9' is not in queries"),
        ("qrels", [QRELS[0], "q1\td9\t1"], r"test\.tsv:2: passage 'd9' is not in corpus"),
        ("qrels", [*QRELS, "q1\td1\t2"], r"test\.tsv:4: 'q1' and 'd1' were judged before"),
        ("qrels", QRELS[:1], r"test\.tsv' holds no judgements"),
    ],
)
def test_unusable_rows_are_named(tmp_path, part, lines, message):
    with pytest.raises(DataError, match=message):
        read_beir(write(tmp_path, **{part: lines}))


def test_missing_and_undecodable_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"corpus\.jsonl' is not UTF-8"):
        read_beir(tmp_path)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read .*corpus\.jsonl"):
        read_beir(tmp_path)


def test_write_beir_is_read_back(tmp_path):
    corpus = [Passage("a", "text\u2028line", "标题", {"k": [1]}), Passage("b", "", "title")]
    write_beir(tmp_path, corpus, {"q": "Frage?"}, {"test": {"q": {"a": 2}}, "train": {"q": {"b": 1}}})
    collection = read_beir(tmp_path, "train")
    assert list(collection.corpus.values()) == corpus
    assert collection.qrels == {"q": {"b": 1}}
    assert json.loads((tmp_path / "queries.jsonl").read_text()) == {"_id": "q", "text": "Frage?"}


def test_ids_and_relevances_in_the_spellings_of_others(tmp_path):
    corpus = ['{"id": "d1", "contents": "one"}', '{"id": 2, "text": "two"}']
    queries = ['{"id": 7, "query": "first"}']
    collection = read_beir(write(tmp_path, corpus, queries, ["7\td1\t1.0", "7\t2\t 2e0"]))
    assert (list(collection.corpus), collection.queries) == (["d1", "2"], {"7": "first"})
    assert collection.qrels == {"7": {"d1": 1, "2": 2}}


@pytest.mark.parametrize("blank", ["", "  \n", "\u200b"])
def test_blank_passages_are_left_out_with_their_judgements_and_counted(tmp_path, caplog, blank):
    corpus = [*CORPUS, json.dumps({"_id": "void", "text": blank}), json.dumps({"_id": "t", "text": "", "title": "T"})]
    qrels = [*QRELS, "q1\tvoid\t1", "q2\tvoid\t1"]
    collection = read_beir(write(tmp_path, corpus, qrels=qrels))
    assert list(collection.corpus) == ["d1", "2", "t"]
    assert (collection.qrels, list(collection.queries)) == ({"q1": {"d1": 1, "2": 0}}, ["q1"])
    assert "1 of 4 passages of" in caplog.text
    assert "with 2 judgements" in caplog.text


# ---- metrics


def test_metrics_match_their_definitions():
    qrels = {"q": {"a": 2, "b": 1, "c": 1, "x": 0}}
    run = {"q": {"x": 5.0, "a": 4.0, "y": 3.0, "b": 2.0}}
    ideal = 2 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = {
        "nDCG@10": (2 / math.log2(3) + 1 / math.log2(5)) / ideal,
        "nDCG@2": 2 / math.log2(3) / (2 + 1 / math.log2(3)),
        "Recall@10": 2 / 3,
        "R@2": 1 / 3,
        "MRR@10": 1 / 2,
        "RR@1": 0.0,
        "Precision@4": 2 / 4,
        "MAP@10": (1 / 2 + 2 / 4) / 3,
        "Success@2": 1.0,
    }
    assert metrics(qrels, run, list(expected)) == pytest.approx(expected)


def test_queries_without_hits_count_as_zero():
    qrels = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}, "q4": {"a": 0}}
    run = {"q1": {"a": 1.0}, "q2": {}, "q4": {"a": 1.0}}
    assert metrics(qrels, run) == {"nDCG@10": 0.25, "Recall@10": 0.25, "MRR@10": 0.25}
    assert list(per_query(qrels, run)) == ["q1", "q2", "q3", "q4"]


def test_queries_without_qrels_are_left_out_and_counted(caplog):
    assert metrics({"q1": {"a": 1}}, {"q1": {"a": 1.0}, "q2": {"a": 1.0}}, ["MRR@10"]) == {"MRR@10": 1.0}
    assert "1 of 2 queries of the run have no qrels" in caplog.text


@pytest.mark.parametrize("order", [["a", "b", "z"], ["z", "b", "a"], ["b", "z", "a"]])
def test_equal_scores_rank_alike_in_every_metric_and_order(order):
    run = {"q": dict.fromkeys(order, 0.5)}
    found = metrics({"q": {"a": 1}}, run, ["nDCG@10", "MRR@10", "Recall@2"])
    assert found == pytest.approx({"nDCG@10": 1 / math.log2(4), "MRR@10": 1 / 3, "Recall@2": 0.0})


def test_scores_that_differ_only_in_double_precision_still_rank():
    run = {"q": {"a": 1.0 + 1e-12, "b": 1.0}}
    assert metrics({"q": {"a": 1}}, run, ["MRR@10"]) == {"MRR@10": 1.0}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("nDGC@10", "did you mean 'nDCG@10'"), ("Recal@5", "'Recall@5'"), ("nDCG", "'nDCG@10'"), ("zzz", "known are")],
)
def test_an_unknown_metric_is_refused_with_the_nearest(name, hint):
    with pytest.raises(UsageError, match=f"unknown metric '{name}'.*{hint}"):
        metrics({"q": {"a": 1}}, {}, [name])


def test_metrics_refuse_no_qrels_and_scores_that_are_not_numbers():
    with pytest.raises(UsageError, match="no qrels"):
        metrics({}, {})
    with pytest.raises(UsageError, match="passage 'a' for query 'q'"):
        metrics({"q": {"a": 1}}, {"q": {"a": math.nan}})


def test_evaluating_imports_neither_torch_nor_the_dataset_downloader():
    code = (
        "import sys; from ultrarag.evaluation.metrics import metrics; assert 'ir_measures' not in sys.modules;"
        "metrics({'q': {'a': 1}}, {'q': {'a': 1.0}});"
        "print([m for m in ('torch', 'ir_datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# ---- significance


def values(array):
    return {f"q{i}": float(v) for i, v in enumerate(array)}


def test_significance_of_a_clear_gain_and_of_none():
    rng = np.random.default_rng(1)
    a = rng.uniform(size=200)
    gain = significance(values(a), values(a + rng.normal(0.1, 0.1, 200)))
    assert 0 < gain.low < gain.difference < gain.high
    assert gain.p_value < 0.001
    noise = significance(values(a), values(a + rng.normal(0.0, 0.3, 200)))
    assert noise.low < 0 < noise.high
    assert noise.p_value > 0.05
    same = significance(values(a), values(a))
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_the_interval_is_that_of_normal_theory_for_many_queries():
    differences = np.random.default_rng(2).normal(0.02, 0.2, 2000)
    result = significance(values(np.zeros(2000)), values(differences))
    half = 1.96 * differences.std(ddof=1) / math.sqrt(2000)
    assert result.low == pytest.approx(result.difference - half, abs=0.1 * half)
    assert result.high == pytest.approx(result.difference + half, abs=0.1 * half)


def test_significance_is_repeatable_and_pairs_by_query():
    a, b = {"x": 0.1, "y": 0.9, "z": 0.5}, {"z": 0.6, "y": 1.0, "x": 0.2}
    result = significance(a, b)
    assert result == significance(dict(reversed(a.items())), b)
    assert result.difference == pytest.approx(0.1)
    assert result.low == pytest.approx(0.1)
    assert "3 queries" in str(result)


def test_significance_refuses_different_or_no_queries():
    for a, b in [({"x": 1.0}, {"y": 1.0}), ({}, {})]:
        with pytest.raises(UsageError, match="same queries"):
            significance(a, b)


# ---- exact search


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_top_k_is_a_stable_full_sort(chunk, k):
    rng = np.random.default_rng(0)
    # Small whole numbers: scores are exact, and equal ones are common.
    queries = rng.integers(-2, 3, (300, 4)).astype(np.float32)
    passages = rng.integers(-2, 3, (250, 4)).astype(np.float32)
    scores, rows = top_k(queries, passages, k, chunk=chunk)
    full = queries @ passages.T
    expected = np.argsort(-full, axis=1, kind="stable")[:, :k]
    assert rows.dtype == np.int64
    assert np.array_equal(rows, expected)
    assert np.array_equal(scores, np.take_along_axis(full, expected, 1))


def test_top_k_of_no_queries_is_empty():
    scores, rows = top_k(np.zeros((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert scores.shape == rows.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "passages", "k", "message"),
    [
        (np.ones((1, 2)), np.ones((3, 2)), 0, "k is 0"),
        (np.ones((1, 2)), np.ones((0, 2)), 1, "no passages"),
        (np.ones((1, 2)), np.ones((3, 4)), 1, r"\(1, 2\) cannot search .*\(3, 4\)"),
        (np.ones(2), np.ones((3, 2)), 1, "cannot search"),
        (np.full((1, 2), np.nan), np.ones((3, 2)), 1, "not finite"),
    ],
)
def test_top_k_refuses(queries, passages, k, message):
    with pytest.raises(UsageError, match=message):
        top_k(queries, passages, k)


def test_run_of_names_what_was_found():
    scores, rows = top_k(np.eye(2), np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), 2)
    run = run_of(["q1", "q2"], ["a", "b", "c"], scores, rows)
    assert run == {
        "q1": {"c": 3.0, "a": 1.0},
        "q2": {"b": 2.0, "a": 0.0},
    }


def test_ndcg_of_rows_is_that_of_the_metrics():
    draws = np.random.default_rng(0)
    for found in (3, 10, 25):
        hits, relevant = draws.permutation(40)[:found], draws.permutation(40)[:6]
        qrels = {"q": {str(row): 1 for row in relevant}}
        run = {"q": {str(row): 1.0 / (rank + 1) for rank, row in enumerate(hits)}}
        assert ndcg_of_rows(hits, relevant) == pytest.approx(metrics(qrels, run)["nDCG@10"])
    assert ndcg_of_rows(hits, np.zeros(0, int)) == 0.0
