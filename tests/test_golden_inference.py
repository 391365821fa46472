"""Our encodings and scores against the peer's inference classes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import golden
from ultrarag import Encoder
from ultrarag.hookspecs import LoadOptions

PRESENT = [item for item in golden.SETS if item.present()]
#: The peer's scores with padding in the maximum differ by batch; those computed alone (batch size 1) do not.
TOLERANCE = 1e-5


def runs():
    return [
        pytest.param(item, run, id=f"{item.name}-{run['name']}")
        for item in PRESENT
        for run in golden.read(item.data / "inference.json")["runs"]
    ]


def encode(item, texts, **options):
    encoder = Encoder.load(str(item.model), adapter="bgem3", device="cpu")
    return encoder, encoder.encode(texts, "passage", **options)


@pytest.mark.parametrize(("item", "run"), runs())
def test_golden_encodings_of_every_head(item, run):
    values, vectors = golden.read(item.data / "inference.json"), golden.arrays(item.data / "inference.npz")
    encoder, ours = encode(item, values["texts"], max_length=run["max_length"])
    tokens = encoder.tokenize(values["texts"], "passage", run["max_length"])
    if "input_ids" in run:
        assert tokens.ids == run["input_ids"]
    assert np.abs(ours.dense - vectors[f"{run['name']}/dense"]).max() < TOLERANCE
    for row, (weights, expected) in enumerate(zip(ours.sparse.to_dicts(), run["lexical_weights"], strict=True)):
        assert weights == pytest.approx({int(token): weight for token, weight in expected.items()}, abs=TOLERANCE)
        peer = vectors[f"{run['name']}/colbert/{row}"]
        assert ours.mask[row].sum() == len(peer)
        assert np.abs(ours.colbert[row][: len(peer)] - peer).max() < TOLERANCE
        assert not ours.colbert[row][len(peer) :].any()


@pytest.mark.parametrize("item", PRESENT, ids=lambda item: item.name)
def test_golden_score_matrices(item):
    values = golden.read(item.data / "inference.json")
    run = next(run for run in values["runs"] if run["name"] == "default")
    encoder, ours = encode(item, values["texts"], max_length=run["max_length"])
    for head, name in (("sparse", "lexical_matching_score"), ("colbert", "colbert_score")):
        expected = np.array(values[name])
        assert np.abs(encoder.similarity(ours, ours, weights={head: 1}) - expected).max() < 2 * TOLERANCE, name


def pair_scores():
    return [
        pytest.param(item, case, id=f"{item.name}-{case['weights']}")
        for item in PRESENT
        for case in golden.read(item.data / "inference.json")["compute_score"]
        if case.get("batch_size", 1) == 1  # in bigger batches the peer lets padding take part in the maximum
    ]


@pytest.mark.parametrize(("item", "case"), pair_scores())
def test_golden_weighted_pair_scores(item, case):
    """The peer divides by the sum of the weights; ours is the plain weighted sum."""
    encoder = Encoder.load(str(item.model), adapter="bgem3", device="cpu")
    dense, sparse, colbert = case["weights"]
    pairs = [tuple(pair) for pair in case["pairs"]]
    weights = {"dense": dense, "sparse": sparse, "colbert": colbert}
    ours = encoder.score(pairs, weights=weights, max_length=case.get("max_length"))
    expected = case.get("out", case.get("scores"))["colbert+sparse+dense"]
    assert ours / sum(weights.values()) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.skipif(not golden.VISIBLE_SET.present(), reason=golden.WHY_SKIPPED)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_golden_one_vector_models(pooling, normalize):
    item = golden.VISIBLE_SET
    texts = golden.read(item.data / "inference.json")["texts"]
    options = LoadOptions(pooling=pooling, normalize=normalize)
    encoder = Encoder.load(str(item.model), adapter="bge", device="cpu", options=options)
    expected = golden.arrays(item.data / "inference.npz")[f"flagmodel/{pooling}/{'norm' if normalize else 'nonorm'}"]
    ours = encoder.encode(
        texts, "passage", max_length=golden.read(item.data / "inference.json")["runs"][0]["max_length"]
    )
    assert np.abs(ours.dense - expected).max() < TOLERANCE
