"""Encoder: order, prompts, limits, heads, errors, and independence of what shares a batch."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ultrarag import Embeddings, Encoder
from ultrarag.errors import CheckpointError, DataError, UsageError
from ultrarag.hookspecs import LoadOptions
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_m3, tiny_minicpm

TEXTS = ["a", "向量数据库是什么？", "the quick brown fox " * 6, "", "two words", "x " * 40]


def test_real_model_gives_sentence_transformers_vectors(minilm, minilm_encoder):
    from sentence_transformers import SentenceTransformer

    expected = SentenceTransformer(minilm, device="cpu").encode(TEXTS)
    assert np.abs(minilm_encoder.encode(TEXTS).dense - expected).max() < 1e-6


def test_vectors_do_not_depend_on_batchmates(m3_encoder):
    together = m3_encoder.encode(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = m3_encoder.encode([text])
        assert np.abs(alone.dense[0] - together.dense[row]).max() < 1e-5
        assert alone.sparse.to_dicts()[0] == pytest.approx(together.sparse.to_dicts()[row], abs=1e-5)
        tokens = int(together.mask[row].sum())
        assert alone.colbert.shape[1] == tokens
        assert np.abs(alone.colbert[0] - together.colbert[row, :tokens]).max(initial=0) < 1e-5


def test_chunks_and_budgets_change_nothing(m3_encoder):
    whole = m3_encoder.encode(TEXTS)
    pieces = Embeddings.cat(list(m3_encoder.iter_encode(iter(TEXTS), chunk_texts=2, batch_tokens=1)))
    assert np.abs(pieces.dense - whole.dense).max() < 1e-5
    assert pieces.sparse.to_dicts() == [pytest.approx(row, abs=1e-5) for row in whole.sparse.to_dicts()]


def test_one_string_is_one_text(m3_encoder):
    assert m3_encoder.encode("one text", heads="dense").dense.shape == (1, m3_encoder.dim)


def test_no_texts_give_no_rows(m3_encoder):
    found = m3_encoder.encode([])
    assert found.dense.shape == (0, m3_encoder.dim)
    assert found.heads == ("dense", "sparse", "colbert")
    assert list(m3_encoder.iter_encode([])) == []


def test_only_requested_heads_are_computed(m3_encoder):
    assert m3_encoder.encode(["x"], heads=["sparse"]).heads == ("sparse",)
    with pytest.raises(UsageError, match=r"head 'sparce' is unknown; did you mean 'sparse'\?"):
        m3_encoder.encode(["x"], heads=["sparce"])


def test_instruction_is_put_before_its_kind_alone(tiny_m3):
    plain = Encoder.load(tiny_m3, adapter="bge")
    prompted = Encoder.load(tiny_m3, adapter="bge", query_instruction="find: ", query_format="{}{}")
    assert np.array_equal(prompted.encode("seals", "query").dense, plain.encode("find: seals", "query").dense)
    assert np.array_equal(prompted.encode("seals", "passage").dense, plain.encode("seals", "passage").dense)
    assert np.array_equal(plain.encode("seals", "query", instruction="find: ").dense, plain.encode("find: seals").dense)


def test_cut_texts_are_counted(m3_encoder, caplog):
    with caplog.at_level(logging.WARNING, "ultrarag"):
        m3_encoder.encode(TEXTS, max_length=8)
    assert "of 6 texts were longer than 8 tokens and were cut" in caplog.text
    caplog.clear()
    m3_encoder.encode(["a"], max_length=8)
    assert not caplog.text


def test_more_tokens_than_positions_are_refused(m3_encoder):
    with pytest.raises(UsageError, match=f"9999 tokens was asked for, but the model takes at most {m3_encoder.limit}"):
        m3_encoder.encode(["a"], max_length=9999)


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        (["fine", None], UsageError, r"texts\[1\] is NoneType, not a string"),
        (["fine", "broken \ud800 text"], DataError, r"texts\[1\] holds a lone surrogate \(character 7\)"),
    ],
)
def test_what_is_not_text_is_refused_by_position(m3_encoder, texts, error, words):
    with pytest.raises(error, match=words):
        m3_encoder.encode(texts)


def test_nul_bytes_are_text(m3_encoder):
    assert np.isfinite(m3_encoder.encode(["a\x00b"]).dense).all()


def test_wrong_arguments_name_the_nearest(tiny_m3, m3_encoder):
    with pytest.raises(UsageError, match="no argument 'query_instructions'; did you mean 'query_instruction'"):
        Encoder.load(tiny_m3, adapter="bge", query_instructions="x")
    with pytest.raises(UsageError, match="kind is 'queries'; it must be 'query', 'passage', or 'text'"):
        m3_encoder.encode(["x"], "queries")
    with pytest.raises(UsageError, match="precision 'bf15' is unknown; did you mean 'bf16'"):
        m3_encoder.encode(["x"], precision="bf15")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="no model folder"):
        Encoder.load(tmp_path / "nothing", adapter="bge")


def test_bf16_is_close_and_fp32_untouched(m3_encoder):
    exact, fast = m3_encoder.encode(TEXTS, heads="dense"), m3_encoder.encode(TEXTS, heads="dense", precision="bf16")
    cosine = (exact.dense * fast.dense).sum(1)
    assert fast.dense.dtype == np.float32
    assert (cosine > 0.99).all()
    assert not np.array_equal(exact.dense, fast.dense)


def test_score_needs_weights_where_there_are_several_heads(m3_encoder):
    pairs = [("seals", "seals sleep under water"), ("bread", "a hot oven"), ("seals", "a hot oven")]
    with pytest.raises(UsageError, match="the model has several heads: say how they weigh"):
        m3_encoder.score(pairs)
    parts = [m3_encoder.score(pairs, weights={head: 1.0}) for head in m3_encoder.heads]
    together = m3_encoder.score(pairs, weights={"dense": 1, "sparse": 0.3, "colbert": 1})
    assert together == pytest.approx(parts[0] + 0.3 * parts[1] + parts[2], abs=1e-5)
    assert m3_encoder.score([], weights={"dense": 1}).shape == (0,)
    with pytest.raises(UsageError, match="all weights are 0"):
        m3_encoder.score(pairs, weights={"dense": 0})


@pytest.fixture
def without_sparse(tiny_m3, tmp_path):
    folder = shutil.copytree(tiny_m3, tmp_path / "model")
    (folder / "sparse_linear.pt").unlink()
    return folder


@pytest.mark.parametrize("pairs", [["a", "b"], "ab", [("a",)], [("a", "b", "c")], [("a", "b"), ("a", 1)]])
def test_what_is_no_pair_is_named(m3_encoder, pairs):
    with pytest.raises((UsageError, DataError), match=r"pair|text"):
        m3_encoder.score(pairs, weights={"dense": 1})
    assert m3_encoder.score([["a", "b"]], weights={"dense": 1}).shape == (1,)


@pytest.mark.parametrize("weights", ["dense", ["dense"], {"dense": "1"}, {"dense": float("nan")}, {"dense": True}])
def test_weights_that_are_none_are_named(m3_encoder, weights):
    with pytest.raises(UsageError, match=r"weights is .* maps each head|'dense' is .* a finite number"):
        m3_encoder.score([("a", "b")], weights=weights)


def test_head_without_weights_is_left_out_or_refused_never_made_up(without_sparse):
    encoder = Encoder.load(without_sparse, adapter="bgem3")
    assert encoder.heads == ("dense", "colbert")  # the other head's own file is still read
    with pytest.raises(UsageError, match="head 'sparse' has no weights here"):
        encoder.encode(["x"], heads=["sparse"])
    with pytest.raises(CheckpointError, match=r"has no sparse_linear.pt: the head has no weights to encode with"):
        Encoder.load(without_sparse, adapter="bgem3", heads=["dense", "sparse"])


def test_training_makes_fresh_heads_of_the_asked_width(minilm):
    options = LoadOptions(training=True, colbert_dim=24)
    encoder = Encoder.load(minilm, adapter="bgem3", options=options)
    assert encoder.heads == ("dense", "sparse", "colbert")
    assert encoder.encode(["some text"], heads="colbert").colbert.shape[2] == 24


def test_colbert_dim_must_fit_an_existing_head(tiny_m3):
    with pytest.raises(UsageError, match=r"colbert_dim is 7, but .*colbert_linear.pt holds a head of 32"):
        Encoder.load(tiny_m3, adapter="bgem3", options=LoadOptions(training=True, colbert_dim=7))


def test_missing_backbone_weights_are_an_error_not_a_random_start(tiny_m3, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_m3, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    removed = next(name for name in sorted(weights) if "attention" in name)
    save_file({k: v for k, v in weights.items() if k != removed}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weights lack 1 tensor.s. .* first '{removed}'"):
        Encoder.load(folder, adapter="bge")


def test_threads_may_encode_at_the_same_time(m3_encoder):
    from concurrent.futures import ThreadPoolExecutor

    expected = m3_encoder.encode(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: m3_encoder.encode(TEXTS), range(8)):
            assert np.abs(found.dense - expected.dense).max() < 1e-6


def test_progress_moves_with_every_forward(m3_encoder):
    seen = []
    list(m3_encoder.iter_encode(TEXTS, batch_tokens=1, on_batch=seen.append))
    assert seen == [1] * len(TEXTS)


@pytest.mark.parametrize(
    ("make", "adapter"),
    [(tiny_bert, "bge"), (tiny_m3, "bgem3"), (tiny_cross_encoder, "bge-reranker"), (tiny_minicpm, "minicpm-embedding")],
)
def test_a_folder_without_manifest_finds_its_adapter_and_says_so_once(tmp_path, make, adapter, caplog):
    make(tmp_path)
    assert [Encoder.load(tmp_path).adapter.name for _ in range(2)] == [adapter, adapter]
    assert caplog.text.count(f"is read with the adapter '{adapter}' (") == 1


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_is_what_the_processor_is_made_for(minilm, monkeypatch, bf16, expected):
    monkeypatch.setattr("ultrarag.encoder.load._cpu_has_bf16", lambda: bf16)
    encoder = Encoder.load(minilm, "bge", device="cpu", precision="auto")
    assert encoder.precision == expected
    assert np.abs(encoder.encode(TEXTS, precision="fp32").dense - encoder.encode(TEXTS).dense).max() < 0.02


def test_a_compiled_encoder_gives_the_same_vectors_and_is_the_same_model(minilm):
    encoder = Encoder.load(minilm, "bge", device="cpu")
    before, name = encoder.encode(TEXTS).dense, encoder.fingerprint
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    encoder.compile(backend=backend)
    assert np.abs(encoder.encode(TEXTS).dense - before).max() < 1e-6
    assert graphs
    assert not any("_orig_mod" in key for key in encoder.model.state_dict())
    del encoder.__dict__["fingerprint"]
    assert encoder.fingerprint == name


def test_loading_and_saving_print_nothing(tiny_m3, tmp_path):
    """transformers imports DeepSpeed where it is installed, which warns on standard output where there is no GPU."""
    code = "import sys; from ultrarag import Encoder; Encoder.load(sys.argv[1], 'bgem3').save(sys.argv[2])"
    command = [sys.executable, "-c", code, tiny_m3, str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
