"""One side trained, or a map learned, against the stored vectors of a corpus: whole runs on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests import forked
from ultrarag import Encoder, Passage
from ultrarag.encode import CorpusVectors, ModelChoice, encode_corpus
from ultrarag.encoder.low_rank import LowRank
from ultrarag.encoder.sides import LOW_RANK
from ultrarag.errors import FingerprintError, TrainingError, UsageError
from ultrarag.finetune import UNMERGED, NoMap, finetune, incremental
from ultrarag.finetune.evaluate import HeldOut
from ultrarag.finetune.step import EmbeddingTrainer
from ultrarag.finetune.step.best import BEST, Best
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder

#: words that the tiny tokenizer knows
WORDS = ["bread", "oven", "water", "seals", "sleep", "dough", "steam"]
WORDS += ["crust", "hot", "long", "under", "rises", "sets", "once"]
ROWS = [
    {
        "query": f"why does {WORDS[i % 14]} {WORDS[(i * 5 + 3) % 14]} {WORDS[(i // 14) % 14]}",
        "pos": [f"the {WORDS[i % 14]} {WORDS[(i * 3 + 1) % 14]} before {WORDS[(i // 14 + 5) % 14]}"],
    }
    for i in range(120)
]
PASSAGES = [Passage(f"p{n}", row["pos"][0]) for n, row in enumerate(ROWS[:110])]
QUICK = {
    "query_max_len": 16,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "temperature": 0.05,
    "use_cpu": True,
    "skip_data_check": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_bert(folder / "raw")
    return str(Encoder.load(folder / "raw", "bge", device="cpu").save(folder / "base"))


@pytest.fixture(scope="module")
def corpus(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"_id": item.id, "text": item.text}) + "\n" for item in PASSAGES]
    (folder / "corpus.jsonl").write_text("".join(lines))
    encode_corpus(ModelChoice(base), folder / "corpus.jsonl", folder / "vectors", devices=("cpu",), progress=False)
    return str(folder / "vectors")


def test_query_side_learns_and_the_passage_side_keeps_its_vectors(base, corpus, tmp_path, monkeypatch):
    parent = Encoder.load(base, device="cpu")
    encoded = []
    monkeypatch.setattr(Encoder, "encode", _counting(Encoder.encode, encoded))
    result = finetune(base, ROWS, tmp_path / "out", train_side="query", corpus=corpus, num_train_epochs=2, **QUICK)
    monkeypatch.undo()
    passages = [text for kind, texts in encoded if kind == "passage" for text in texts if "before" in text]
    assert sorted(set(passages)) == sorted({row["pos"][0] for row in ROWS} - {item.text for item in PASSAGES})
    child = Encoder.load(result.checkpoint, device="cpu")
    assert child.passage_fingerprint == parent.passage_fingerprint
    assert child.query_fingerprint != parent.query_fingerprint
    texts = [item.text for item in PASSAGES]
    assert np.array_equal(child.encode(texts, "passage").dense, parent.encode(texts, "passage").dense)
    assert _loss_of(child, texts) < _loss_of(parent, texts) - 0.05
    record = child.manifest.training.arguments["sides"]
    assert record["corpus"]["passages"] == len(PASSAGES)
    assert record["corpus"]["passage_fingerprint"] == parent.passage_fingerprint


def test_the_first_layers_stay_with_the_embeddings(base, corpus, tmp_path, monkeypatch):
    asked = {"train_side": "query", "corpus": corpus, "max_steps": 2, **QUICK}
    dropping: list[str] = []
    step = EmbeddingTrainer.training_step

    def watched(self, model, *inputs):
        loss = step(self, model, *inputs)
        side = self.encoder.model.side("query")
        dropping.extend(n for n, m in side.named_modules() if isinstance(m, torch.nn.Dropout) and m.training)
        return loss

    monkeypatch.setattr(EmbeddingTrainer, "training_step", watched)
    result = finetune(base, ROWS, tmp_path / "out", freeze_layers=1, **asked)
    assert dropping
    assert all(name.startswith("backbone.encoder.layer.1.") for name in dropping)
    child, parent = Encoder.load(result.checkpoint, device="cpu"), Encoder.load(base, device="cpu")
    before = parent.model.state_dict()
    moved = {name for name, weight in child.side("query").model.state_dict().items() if not weight.equal(before[name])}
    assert moved
    assert all(name.startswith("backbone.encoder.layer.1.") for name in moved)
    assert child.manifest.training.arguments["model"]["freeze_layers"] == 1
    with pytest.raises(UsageError, match="--freeze_layers 3: the model has 2 layers"):
        finetune(base, ROWS, tmp_path / "more", freeze_layers=3, **asked)


def test_the_best_weights_are_kept_in_memory_while_no_checkpoint_is_due(base, corpus, tmp_path, monkeypatch):
    def run(name, early, looks=(0.4, 0.9, 0.8, 0.7), **more):
        found, put_off = iter(looks), iter(early)
        monkeypatch.setattr(HeldOut, "__call__", lambda self, encoder, heads: {"nDCG@10": next(found)})
        monkeypatch.setattr(Best, "early", property(lambda self: next(put_off)))
        asked = {"eval_data": ROWS[:20], "eval_steps": 2, "save_steps": 2, "max_steps": 8, **QUICK, **more}
        out = tmp_path / name
        result = finetune(base, ROWS, out, train_side="query", corpus=corpus, save_min_seconds=60, **asked)
        return result.fingerprint, sorted(path.name for path in out.glob("checkpoint-*"))

    fingerprint, written = run("written", [False] * 4)
    assert written == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert run("kept", [True] * 4) == (fingerprint, [])
    with pytest.raises(StopIteration):  # the third look does not come: what is left is a worse step, and the best
        run("killed", [True, True, False], looks=(0.4, 0.9, 0.8))
    assert (tmp_path / "killed" / "checkpoint-6" / BEST).is_file()
    again = run("killed", [False], looks=(0.7,), resume_from_checkpoint=True)
    assert again == (fingerprint, ["checkpoint-6", "checkpoint-8"])


def _weights(path):
    """The query side's weights; those of a plain model, where it has no sides."""
    return Encoder.load(path, device="cpu").side("query").model.state_dict()


@pytest.mark.parametrize("again", [False, True])
def test_a_query_side_is_averaged_with_its_parents(base, corpus, tmp_path, again):
    """Also where the parent has two sides already."""
    asked = {"train_side": "query", "corpus": corpus, "max_steps": 4, "eval_data": ROWS[:20], **QUICK}
    parent = finetune(base, ROWS[:60], tmp_path / "first", **asked).checkpoint if again else base
    trained = finetune(parent, ROWS, tmp_path / "trained", freeze_layers=1, **asked)
    asked |= {"merge_with": "parent", "merge_weight": 0.7}
    result = finetune(parent, ROWS, tmp_path / "out", freeze_layers=1, **asked)
    before, after, found = (_weights(path) for path in (parent, trained.checkpoint, result.checkpoint))
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved == {name for name in before if not found[name].equal(before[name])}
    assert all(torch.allclose(found[name], before[name].lerp(after[name], 0.7), atol=1e-7) for name in moved)
    old, child = (Encoder.load(path, device="cpu") for path in (parent, result.checkpoint))
    assert child.passage_fingerprint == old.passage_fingerprint
    assert result.metrics["unmerged"] == trained.metrics["after"]
    assert (result.merge["weight"], result.merge["fingerprint"]) == (0.7, old.fingerprint)
    assert not (tmp_path / "out" / UNMERGED).exists()
    (told,) = [note for note in result.notes if note.startswith("merged: ")]
    assert told.startswith("merged: 0.7 of the trained weights, the rest those of the parent (nDCG@10 0.")


@pytest.mark.parametrize("last", ["step", "merge"])
def test_a_query_side_that_is_killed_ends_with_the_same_average(base, corpus, tmp_path, last):
    asked = {"train_side": "query", "corpus": corpus, "max_steps": 7, "save_steps": 3, **QUICK}
    asked |= {"merge_with": "parent", "merge_weight": 0.7, "freeze_layers": 1}
    whole = finetune(base, ROWS, tmp_path / "whole", **asked)
    with pytest.MonkeyPatch.context() as patch:
        step = EmbeddingTrainer.training_step

        def dies(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise RuntimeError("killed")
            return step(self, *args, **kwargs)

        def stops(*args):
            raise KeyboardInterrupt

        if last == "step":
            patch.setattr(EmbeddingTrainer, "training_step", dies)
        else:
            patch.setattr(incremental._Merger, "finish", stops)
        with pytest.raises((RuntimeError, KeyboardInterrupt), match=r"killed|the checkpoints of training are kept"):
            finetune(base, ROWS, tmp_path / "broken", **asked)
    broken = finetune(base, ROWS, tmp_path / "broken", resume_from_checkpoint=True, **asked)
    assert broken.fingerprint == whole.fingerprint


def test_the_average_of_a_low_rank_query_side_is_its_matrices_scaled(base, corpus, tmp_path):
    pytest.importorskip("peft")
    asked = {"train_side": "query", "corpus": corpus, "use_lora": True, "lora_rank": 4, "max_steps": 6}
    asked |= {**QUICK, "learning_rate": 1e-2, "eval_data": ROWS[:20]}
    trained = finetune(base, ROWS, tmp_path / "trained", **asked)
    result = finetune(base, ROWS, tmp_path / "out", merge_with="parent", merge_weight=0.7, **asked)
    before, after, found = (_weights(path) for path in (base, trained.checkpoint, result.checkpoint))
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved
    assert all(torch.allclose(found[name], before[name].lerp(after[name], 0.7), atol=1e-6) for name in moved)
    assert result.metrics["unmerged"] == trained.metrics["after"]
    models = list((tmp_path / "out").glob("*/model.safetensors"))
    assert [path.parent.name for path in models] == ["passage"]  # no second model
    scaling = [LowRank.load(path / LOW_RANK).scaling for path in (tmp_path / "out", tmp_path / "trained")]
    assert scaling[0] == pytest.approx(0.7 * scaling[1])


def _counting(encode, seen):
    def counted(self, texts, kind="passage", **options):
        seen.append((kind, list(texts)))
        return encode(self, texts, kind, **options)

    return counted


def _loss_of(encoder, texts):
    query = torch.from_numpy(encoder.encode([row["query"] for row in ROWS[:110]], "query").dense)
    passage = torch.from_numpy(encoder.encode(texts, "passage").dense)
    return float(torch.nn.functional.cross_entropy(query @ passage.T / 0.05, torch.arange(110)))


def test_map_of_the_queries_is_learned_without_a_trainer_and_twice_the_same(base, corpus, tmp_path, capsys):
    maps = {"train_side": "query", "query_map": "linear", "corpus": corpus, "map_steps": 60}
    results = [finetune(base, ROWS, tmp_path / name, **maps, **QUICK) for name in ("one", "two")]
    assert results[0].fingerprint == results[1].fingerprint
    parent, child = Encoder.load(base, device="cpu"), Encoder.load(results[0].checkpoint, device="cpu")
    assert child.passage_fingerprint == parent.passage_fingerprint
    assert len(child.query_maps) == 1
    texts = [item.text for item in PASSAGES]
    assert _loss_of(child, texts) < _loss_of(parent, texts) - 0.05
    found = child.manifest.training.arguments["sides"]["found"]
    assert found["after"] > found["before"]
    assert found["settings"]["steps"] <= 60
    assert "held-out queries of other documents" in capsys.readouterr().err


def test_both_maps_are_learned_together(base, corpus, tmp_path):
    maps = {"train_side": "query", "query_map": "linear", "passage_map": "linear", "corpus": corpus, "map_steps": 60}
    child = Encoder.load(finetune(base, ROWS, tmp_path / "out", **maps, **QUICK).checkpoint, device="cpu")
    assert (len(child.query_maps), len(child.passage_maps)) == (1, 1)
    parent = Encoder.load(base, device="cpu")
    stored = parent.encode([PASSAGES[0].text], "passage").dense
    assert np.abs(child.passage_maps[0].apply(stored) - child.encode([PASSAGES[0].text], "passage").dense).max() < 1e-5


def test_a_map_that_gains_nothing_on_other_documents_is_not_written(base, corpus, tmp_path):
    noise = [{"query": row["query"], "pos": ROWS[(i * 37 + 11) % 110]["pos"]} for i, row in enumerate(ROWS)]
    with pytest.raises(TrainingError, match="no map gains anything on held-out queries"):
        finetune(base, noise, tmp_path / "out", train_side="query", query_map="linear", corpus=corpus, **QUICK)
    assert not (tmp_path / "out" / "ultrarag.json").exists()


def test_passage_map_is_trained_beside_the_query_side(base, corpus, tmp_path):
    given = {"train_side": "query", "passage_map": "linear", "corpus": corpus, "map_steps": 60}
    child = Encoder.load(finetune(base, ROWS, tmp_path / "out", **given, **QUICK).checkpoint, device="cpu")
    (found,) = child.passage_maps
    assert np.abs(found.weight - np.eye(32)).max() > 0.01
    assert child.query_maps == ()
    parent = Encoder.load(base, device="cpu")
    assert child.manifest.unmapped_passage_fingerprint == parent.passage_fingerprint
    texts = [item.text for item in PASSAGES]
    assert _loss_of(child, texts) < _loss_of(parent, texts) - 0.05


def test_a_passage_map_that_gains_nothing_is_left_out_beside_the_query_side(base, corpus, tmp_path, capsys):
    noise = [{"query": row["query"], "pos": ROWS[(i * 37 + 11) % 110]["pos"]} for i, row in enumerate(ROWS)]
    given = {"train_side": "query", "passage_map": "linear", "corpus": corpus, "map_steps": 20}
    child = Encoder.load(finetune(base, noise, tmp_path / "out", **given, **QUICK).checkpoint, device="cpu")
    parent = Encoder.load(base, device="cpu")
    assert child.passage_maps == ()
    assert child.passage_fingerprint == parent.passage_fingerprint  # an index shares its vectors
    assert child.query_fingerprint != parent.query_fingerprint
    assert "it is left out, and stored vectors stay" in capsys.readouterr().err


def test_a_required_passage_map_that_gains_nothing_is_refused_before_training(base, corpus, tmp_path):
    noise = [{"query": row["query"], "pos": ROWS[(i * 37 + 11) % 110]["pos"]} for i, row in enumerate(ROWS)]
    given = {"train_side": "query", "passage_map": "linear", "corpus": corpus, "map_steps": 20, "require_map": True}
    with pytest.raises(NoMap, match=r"the passage map gains nothing .* leave --require_map out"):
        finetune(base, noise, tmp_path / "out", **given, **{**QUICK, "save_steps": 1})
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_low_rank_query_side_is_kept_beside_its_parents_weights(base, corpus, tmp_path):
    given = {"train_side": "query", "corpus": corpus, "use_lora": True, "lora_rank": 4, "num_train_epochs": 3}
    result = finetune(base, ROWS, tmp_path / "out", **given, **{**QUICK, "learning_rate": 1e-2})
    parent, child = Encoder.load(base, device="cpu"), Encoder.load(result.checkpoint, device="cpu")
    assert child.fingerprint == result.fingerprint
    assert child.passage_fingerprint == parent.passage_fingerprint
    texts = [item.text for item in PASSAGES]
    assert _loss_of(child, texts) < _loss_of(parent, texts) - 0.05
    models = list((tmp_path / "out").glob("*/model.safetensors"))
    assert [path.parent.name for path in models] == ["passage"]  # no second model


@pytest.mark.parametrize("side", ["both", "passage"])
def test_stale_vectors_stand_beside_the_batch(base, corpus, tmp_path, side):
    parent = Encoder.load(base, device="cpu")
    child = Encoder.load(
        finetune(base, ROWS, tmp_path / "out", train_side=side, corpus=corpus, **QUICK).checkpoint, device="cpu"
    )
    assert child.passage_fingerprint != parent.passage_fingerprint
    assert (child.query_fingerprint == parent.query_fingerprint) == (side == "passage")
    texts = [item.text for item in PASSAGES]
    assert _loss_of(child, texts) < _loss_of(parent, texts) - 0.05


def test_all_heads_are_trained_against_the_corpus(tiny_m3, tmp_path):
    parent = Encoder.load(tiny_m3, "bgem3", device="cpu")
    vectors = CorpusVectors.of(parent, PASSAGES)
    quick = {**QUICK, "unified_finetuning": True, "corpus_negatives": 40, "num_train_epochs": 2}
    result = finetune(tiny_m3, ROWS, tmp_path / "out", "bgem3", train_side="query", corpus=vectors, **quick)
    child = Encoder.load(result.checkpoint, device="cpu")
    assert child.passage_fingerprint == parent.passage_fingerprint
    assert len(list((tmp_path / "out").glob("nearest-*.npy"))) == 2  # a resumed run reads what an epoch began with
    before, after = (e.encode([ROWS[0]["query"]], "query") for e in (parent, child))
    for head in ("dense", "colbert"):
        assert np.abs(getattr(before, head) - getattr(after, head)).max() > 1e-4
    assert np.abs(before.sparse.weights - after.sparse.weights).max() > 1e-4


def test_a_run_that_was_stopped_ends_with_the_same_weights(base, corpus, tmp_path):
    """With hard negatives of the epoch's beginning, a map in training, and no step on a checkpoint's boundary."""
    given = {"train_side": "query", "passage_map": "linear", "corpus": corpus, "corpus_negatives": 30}
    given |= {"map_learning_rate": 1e-3, "map_regularization": 0.01, "map_steps": 20, "save_steps": 5, **QUICK}
    whole = finetune(base, ROWS, tmp_path / "whole", num_train_epochs=2, **given)
    with pytest.MonkeyPatch.context() as patch:
        from ultrarag.finetune.step.trainer import EmbeddingTrainer

        step = EmbeddingTrainer.training_step

        def dies(self, *args, **kwargs):
            if self.state.global_step == 7:
                raise RuntimeError("killed")
            return step(self, *args, **kwargs)

        patch.setattr(EmbeddingTrainer, "training_step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(base, ROWS, tmp_path / "broken", num_train_epochs=2, **given)
    broken = finetune(base, ROWS, tmp_path / "broken", num_train_epochs=2, resume_from_checkpoint=True, **given)
    assert broken.fingerprint == whole.fingerprint


def test_two_processes_give_the_weights_of_one(tmp_path):
    """Sampled negatives, the nearest among them, are the same ones on all ranks; a map's gradient is shared."""
    base = tmp_path / "model"
    tiny_bert(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # which each rank draws for itself
    (base / "config.json").write_text(json.dumps(config))
    flags = {"model_name_or_path": base, "train_data": tmp_path / "train.jsonl", "cache_path": tmp_path / "cache"}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags |= {"train_side": "query", "passage_map": "linear", "corpus_negatives": 60}
    flags |= {"map_learning_rate": 1e-3, "map_regularization": 0.01, "map_steps": 20, "max_steps": 4}
    flags |= {**QUICK, "optim": "sgd", "max_grad_norm": 0}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--adapter", "bge", "--output_dir"]
    for name, size, processes in (("one", 16, 1), ("two", 8, 2)):
        words[words.index("--per_device_train_batch_size") + 1] = str(size)
        done = forked.torchrun(["-m", "ultrarag.finetune", *words, str(tmp_path / name)], processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (Encoder.load(tmp_path / name, device="cpu").model.state_dict() for name in ("one", "two"))
    moved = Encoder.load(base, "bge", device="cpu").model.state_dict()
    assert max((one[f"query.{name}"] - tensor).abs().max() for name, tensor in moved.items()) > 1e-4
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0, atol=1e-6), name


def test_vectors_of_another_model_are_refused(base, corpus, tmp_path):
    tiny_bert(tmp_path / "other", seed=1)
    with pytest.raises(FingerprintError, match="encode the corpus with this model"):
        finetune(tmp_path / "other", ROWS, tmp_path / "out", "bge", train_side="query", corpus=corpus, **QUICK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_side": "both", "passage_map": "linear"}, "would encode anew"),
        ({"train_side": "passage", "query_map": "linear"}, "train_side query"),
        ({"train_side": "query", "map_rank": 4}, "no effect without"),
        ({"train_side": "query", "require_map": True}, "require_map has no effect without"),
        ({"train_side": "query", "shuffle_ratio": 0.5}, "not encoded again"),
        ({"train_side": "passage", "merge_with": "parent", "merge_weight": 0.5}, "no average"),
        (
            {"train_side": "query", "merge_with": "base", "merge_weight": 0.5},
            "an average with that of its parent alone",
        ),
        ({"train_side": "query", "passage_map": "linear", "merge_with": "parent", "merge_weight": 0.5}, "a map has no"),
        ({"train_side": "query", "merge_with": "parent"}, "--merge_weight auto needs --eval_data"),
        ({"corpus_negatives": 7}, "without --corpus"),
        ({"train_side": "sides"}, "one of both, query, passage"),
    ],
)
def test_what_does_not_go_together_is_refused(base, tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        finetune(base, ROWS, tmp_path / "out", **given, **QUICK)


def test_rerankers_have_no_side(tmp_path):
    tiny_cross_encoder(tmp_path / "model")
    rows = [{**row, "neg": ["bread"]} for row in ROWS]
    with pytest.raises(UsageError, match="reads pairs"):
        finetune(tmp_path / "model", rows, tmp_path / "out", "bge-reranker", train_side="query", **QUICK)
