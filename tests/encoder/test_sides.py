"""Asymmetric encoders: two sides, their maps and identities, and checkpoints that ours and others load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrarag import Encoder
from ultrarag.checkpoint import copy_checkpoint, read_manifest
from ultrarag.encoder import LowRank, read_passage_maps
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.maps import LinearMap, apply_chain
from ultrarag.testing import tiny

TEXTS = ["a", "seals sleep under water", "what is a vector database? " * 2, "the quick brown fox", ""]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "model"
    tiny.tiny_bert(folder)
    settings = {"query_instruction": "query: ", "passage_instruction": "passage: "}
    Encoder.load(folder, "bge", device="cpu", **settings).save(folder.parent / "saved")
    return folder.parent / "saved"


@pytest.fixture
def encoder(bert):
    return Encoder.load(bert, device="cpu")


def moved(path, adapter: str | None = None, scale: float = 0.05, **settings) -> Encoder:
    """The same model with other weights, as if it was trained."""
    encoder = Encoder.load(path, adapter, device="cpu", **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter += scale * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return encoder


def a_map(dim: int, seed: int = 0, normalize: bool = True, head: str = "dense") -> LinearMap:
    random = np.random.default_rng(seed)
    return LinearMap(np.eye(dim) + 0.1 * random.normal(size=(dim, dim)), 0.1 * random.normal(size=dim), normalize, head)


def low_rank(encoder: Encoder) -> LowRank:
    """Matrices as LoRA leaves them, in two layers."""
    generator = torch.Generator().manual_seed(2)
    names = [
        n for n, p in encoder.model.named_parameters() if "attention" in n and n.endswith("weight") and p.ndim == 2
    ]
    shapes = {name: encoder.model.get_parameter(name).shape for name in names[:2]}
    return LowRank(
        {
            name: (
                torch.randn(2, into, generator=generator) * 0.2,
                torch.randn(out, 2, generator=generator) * 0.2,
            )
            for name, (out, into) in shapes.items()
        },
        2.0,
    )


def same(left, right, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(left, right, atol=tolerance)


# ---- identity


def test_a_symmetric_encoder_has_one_identity_and_says_nothing_of_sides(encoder, bert):
    assert not encoder.asymmetric
    assert encoder.query_maps == encoder.passage_maps == ()
    assert encoder.fingerprint == encoder.query_fingerprint == encoder.passage_fingerprint
    manifest = read_manifest(bert)
    assert manifest.query_fingerprint == manifest.unmapped_passage_fingerprint == encoder.fingerprint
    written = json.loads((bert / "ultrarag.json").read_text())
    assert "sides" not in written
    assert written["format"] == 1


def test_a_tuned_query_side_keeps_its_parents_passage_identity(encoder, bert, tmp_path):
    tuned = moved(bert, query_instruction="Find: ")
    both = Encoder.of_sides(encoder, tuned)
    assert both.passage_fingerprint == encoder.fingerprint
    assert both.query_fingerprint == tuned.fingerprint
    assert both.fingerprint not in (encoder.fingerprint, tuned.fingerprint)
    loaded = Encoder.load(both.save(tmp_path / "both"), device="cpu")
    for name in ("fingerprint", "query_fingerprint", "passage_fingerprint"):
        assert getattr(loaded, name) == getattr(both, name) == getattr(read_manifest(tmp_path / "both"), name)
    same(loaded.encode(TEXTS, "query").dense, tuned.encode(TEXTS, "query").dense)
    same(loaded.encode(TEXTS, "passage").dense, encoder.encode(TEXTS, "passage").dense)
    assert loaded.settings.query_instruction == "Find: "
    told = Encoder.load(tmp_path / "both", device="cpu", query_instruction="Ask: ")
    assert told.passage_fingerprint == encoder.fingerprint
    assert told.query_fingerprint != tuned.fingerprint


def test_maps_are_a_chain_that_both_identity_and_manifest_tell(encoder, tmp_path):
    first, second, query = (a_map(encoder.dim, seed) for seed in range(3))
    once = Encoder.of_sides(encoder, passage_maps=[first])
    twice = Encoder.of_sides(once, query_maps=[query], passage_maps=[second])
    twice.save(tmp_path / "twice")
    loaded = Encoder.load(tmp_path / "twice", device="cpu")
    plain = encoder.encode(TEXTS, "passage").dense
    same(loaded.encode(TEXTS, "passage").dense, apply_chain([first, second], plain))
    same(loaded.encode(TEXTS, "query").dense, query.apply(encoder.encode(TEXTS, "query").dense))
    manifest = read_manifest(tmp_path / "twice")
    assert manifest.passage_maps == (first.digest, second.digest)
    assert manifest.query_maps == (query.digest,)
    assert manifest.unmapped_passage_fingerprint == encoder.fingerprint == once.query_fingerprint
    assert len({encoder.fingerprint, once.passage_fingerprint, twice.passage_fingerprint}) == 3
    assert [item.digest for item in read_passage_maps(tmp_path / "twice")] == [first.digest, second.digest]
    assert len(list((tmp_path / "twice").rglob("config.json"))) == 1 + 2 + 6  # one model (two modules), three maps


def test_a_low_rank_query_side_is_stored_beside_its_model_and_has_the_same_weights_to_the_bit(encoder, tmp_path):
    changes = low_rank(encoder)
    both = Encoder.of_sides(encoder, low_rank=changes)
    assert both.passage_fingerprint == encoder.fingerprint != both.query_fingerprint
    loaded = Encoder.load(both.save(tmp_path / "both"), device="cpu")
    assert loaded.query_fingerprint == both.query_fingerprint
    assert not (tmp_path / "both" / "query").exists()
    added = sum(file.stat().st_size for file in (tmp_path / "both" / "query_low_rank").iterdir())
    assert added < 0.2 * (tmp_path / "both" / "passage" / "model.safetensors").stat().st_size
    whole = Encoder.of_sides(loaded.side("passage"), loaded.side("query"))
    assert whole.fingerprint == both.fingerprint
    again = Encoder.load(Encoder.of_sides(loaded, query_maps=[a_map(encoder.dim)]).save(tmp_path / "mapped"))
    assert (tmp_path / "mapped" / "query_low_rank").is_dir()
    assert again.passage_fingerprint == encoder.fingerprint


def test_matrices_come_from_peft_with_its_names(encoder):
    peft = pytest.importorskip("peft")
    backbone = Encoder.load(encoder.manifest and encoder.model.config.name_or_path, "bge", device="cpu").model.backbone
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, backbone)
    matrices = {
        f"base_model.model.{name.replace('.default', '')}": tensor
        for name, tensor in backbone.state_dict().items()
        if ".lora_" in name
    }
    both = Encoder.of_sides(encoder, low_rank=LowRank.of_peft(matrices, 3.0))
    backbone.eval()
    features = encoder.features(encoder.tokenize(TEXTS, "query"))
    features = {name: features[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = backbone(**features).last_hidden_state
        found = both.model.side("query").backbone(**features).last_hidden_state
    same(found[features["attention_mask"] > 0], wanted[features["attention_mask"] > 0], 1e-5)


# ---- other heads and plugins


def test_every_head_makes_the_round_trip(m3_encoder, tiny_m3, tmp_path):
    tuned = moved(tiny_m3, "bgem3")
    token_map = a_map(m3_encoder.encode(["a"]).colbert.shape[-1], 3, head="colbert")
    both = Encoder.of_sides(m3_encoder, tuned, passage_maps=[token_map])
    loaded = Encoder.load(both.save(tmp_path / "both"), device="cpu")
    query, wanted = loaded.encode(TEXTS, "query"), tuned.encode(TEXTS, "query")
    same(query.dense, wanted.dense)
    assert query.sparse.to_dicts() == wanted.sparse.to_dicts()
    passage, plain = loaded.encode(TEXTS, "passage"), m3_encoder.encode(TEXTS, "passage")
    same(passage.colbert, token_map.apply(plain.colbert) * plain.mask[..., None], 1e-5)
    assert np.abs(passage.colbert[passage.mask == 0]).max(initial=0) == 0
    same(loaded.score([(TEXTS[1], TEXTS[3])], weights={"dense": 1}), (wanted.dense[1] * plain.dense[3]).sum())


def test_a_low_precision_forward_goes_through_both_sides(encoder, bert):
    both = Encoder.of_sides(encoder, moved(bert), query_maps=[a_map(encoder.dim)])
    for kind in ("query", "passage"):
        exact, half = both.encode(TEXTS, kind).dense, both.encode(TEXTS, kind, precision="bf16").dense
        assert 0 < np.abs(exact - half).max() < 0.05


def test_a_symmetric_task_has_no_side(encoder):
    both = Encoder.of_sides(encoder, query_maps=[a_map(encoder.dim)])
    with pytest.raises(UsageError, match="none for kind 'text'"):
        both.encode(TEXTS, "text")
    features = both.features(both.side("passage").tokenize(TEXTS, "text"))
    with pytest.raises(UsageError, match="two sides differ, and a batch of kind 'text'"):
        both.adapter.encode(both.model, features)


def test_what_cannot_be_two_sides_is_refused_by_name(encoder, m3_encoder, tmp_path):
    tiny.tiny_cross_encoder(tmp_path / "reranker")
    reranker = Encoder.load(tmp_path / "reranker", "bge-reranker", device="cpu")
    with pytest.raises(UsageError, match=r"'bge-reranker' .* reads \(query, passage\) pairs"):
        Encoder.of_sides(reranker)
    with pytest.raises(UsageError, match="the query side is of 'bgem3', the passage side of 'bge'"):
        Encoder.of_sides(encoder, m3_encoder)
    with pytest.raises(UsageError, match="a map does not fit"):
        Encoder.of_sides(encoder, query_maps=[a_map(encoder.dim + 1)])
    with pytest.raises(UsageError, match=r"no weight 'backbone.none.weight'"):
        Encoder.of_sides(encoder, low_rank=LowRank({"backbone.none.weight": (torch.ones(1, 1),) * 2}, 1.0))


# ---- files


def test_a_copy_is_checked_and_damage_is_named(encoder, bert, tmp_path):
    Encoder.of_sides(encoder, moved(bert), passage_maps=[a_map(encoder.dim)]).save(tmp_path / "both")
    manifest = read_manifest(tmp_path / "both")
    copy_checkpoint(tmp_path / "both", manifest, tmp_path / "copy")
    assert Encoder.load(tmp_path / "copy", device="cpu").fingerprint == manifest.fingerprint
    weights = tmp_path / "both" / "passage_map_0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"passage_map_0/model.safetensors.*checksum"):
        copy_checkpoint(tmp_path / "both", manifest, tmp_path / "again")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"passage_map_0/model.safetensors is missing"):
        Encoder.load(tmp_path / "both")


@pytest.mark.parametrize("name", ["model", "maps", "low_rank"])
def test_a_side_outside_of_the_folder_is_refused(encoder, tmp_path, name):
    Encoder.of_sides(encoder, query_maps=[a_map(encoder.dim)]).save(tmp_path / "both")
    shutil.copytree(tmp_path / "both" / "passage", tmp_path / "elsewhere")
    (tmp_path / "both" / "ultrarag.json").unlink()
    declared = json.loads((tmp_path / "both" / "sides.json").read_text())
    declared["query"][name] = ["../elsewhere"] if name == "maps" else "../elsewhere"
    (tmp_path / "both" / "sides.json").write_text(json.dumps(declared))
    with pytest.raises(CheckpointError, match=r"sides.json names '../elsewhere'"):
        Encoder.load(tmp_path / "both", "bge")


def test_sides_that_publishing_would_change_are_not_published(encoder, tmp_path):
    both = Encoder.of_sides(encoder, low_rank=low_rank(encoder))
    with torch.no_grad():
        for name in both.model.low_rank.names:
            both.model.query.get_parameter(name).mul_(-3)  # trained further: no longer what the matrices say
    with pytest.raises(CheckpointError, match="gives other vectors than the model in memory"):
        both.save(tmp_path / "both")
    assert not (tmp_path / "both").exists()


# ---- sentence-transformers


def st_tiny(folder: Path) -> Encoder:
    return Encoder.load(folder, "sentence-transformers", device="cpu")


@pytest.mark.parametrize("adapter", ["bge", "sentence-transformers"])
@pytest.mark.parametrize("tuned", ["whole", "low rank", "maps alone"])
def test_sentence_transformers_gives_the_same_vectors(adapter, tuned, bert, tmp_path):
    encoder = Encoder.load(bert, adapter, device="cpu")
    maps = {"query_maps": [a_map(encoder.dim, 1, encoder.settings.normalize)], "passage_maps": [a_map(encoder.dim, 2)]}
    sides = {"whole": {"query": moved(bert, adapter)}, "low rank": {"low_rank": low_rank(encoder)}}.get(tuned, {})
    both = Encoder.of_sides(encoder, **sides, **maps)
    compare_with_library(both, both.save(tmp_path / "both"), trust_remote_code=tuned == "low rank")


def test_sentence_transformers_gives_the_same_vectors_of_the_real_model(minilm, minilm_encoder, tmp_path):
    tuned = moved(minilm, "bge", 0.01)
    both = Encoder.of_sides(minilm_encoder, tuned, passage_maps=[a_map(minilm_encoder.dim)])
    compare_with_library(both, both.save(tmp_path / "both"))


def compare_with_library(both: Encoder, path: Path, **options) -> None:
    from sentence_transformers import SentenceTransformer

    loaded = Encoder.load(path, device="cpu")
    assert loaded.fingerprint == both.fingerprint
    model = SentenceTransformer(str(path), device="cpu", **options)
    same(model.encode_query(TEXTS), loaded.encode(TEXTS, "query").dense, 1e-5)
    same(model.encode_document(TEXTS), loaded.encode(TEXTS, "passage").dense, 1e-5)
    assert np.abs(model.encode_query(TEXTS) - model.encode_document(TEXTS)).max() > 1e-2
