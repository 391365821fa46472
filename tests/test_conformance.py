"""The conformance kit: every built-in adapter passes it, and every check fails for an adapter that is broken so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ultrarag import Embeddings, Sparse, hookimpl
from ultrarag.adapters.hooks import EmbedderAdapter
from ultrarag.cli import main
from ultrarag.errors import UsageError
from ultrarag.losses import cross_encoder_loss, embedding_loss
from ultrarag.plugins import registry
from ultrarag.testing import CHECKS, check_adapter, run_check
from ultrarag.testing.examples import EXAMPLES
from ultrarag.testing.subject import Subject
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_m3
from ultrarag.types import Tokens

#: Checks that a built-in adapter may be excused from, with the reason that the report gives.
EXCUSED = {"bge-reranker": {"other devices": "a cross-encoder has no in-batch negatives"}}


def built_in() -> list[str]:
    return [row.name for row in registry().plugins() if row.kind == "adapter" and row.package == "ultrarag"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from the models' own libraries
@pytest.mark.parametrize("name", built_in())
def test_built_in_adapters_pass(name):
    assert name in EXAMPLES, f"give '{name}' a tiny model: a line in ultrarag/testing/examples.py"
    report = check_adapter(name)
    assert report.ok, str(report)
    assert [result.check for result in report.results] == ["hooks", *CHECKS]
    skipped = {result.check: result.detail for result in report.results if result.status == "not applicable"}
    assert skipped == EXCUSED.get(name, {})


@pytest.fixture
def register():
    """A function that registers an adapter for the length of a test."""
    names = []

    def add(plugin, name="toy"):
        registry().register(plugin, name)
        names.append(name)
        return name

    yield add
    for name in names:
        registry().unregister(name)


@pytest.fixture
def subject(register, tmp_path):
    """A function that makes the kit's subject out of an adapter and a tiny model."""

    def make(plugin, model=tiny_bert):
        model(tmp_path / "model")
        (tmp_path / "scratch").mkdir()
        return Subject(registry().adapter(register(plugin)), tmp_path / "model", tmp_path / "scratch")

    return make


class Toy(EmbedderAdapter):
    """The base of the broken adapters: correct."""


class Half(Toy):
    @hookimpl
    def load(self, path, options):
        return EmbedderAdapter.load(self, path, options).half()


class UndeclaredHead(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.settings.heads = ("dense", "sparse")
        return model


class IgnoresHeads(Toy):
    heads = ("dense", "sparse", "colbert")

    @hookimpl
    def encode(self, model, features):
        return model.encode({**features, "heads": model.settings.heads})


class NotUnitLength(Toy):
    @hookimpl
    def encode(self, model, features):
        return Embeddings(dense=model.encode(features).dense * 2)


class Flat(Toy):
    @hookimpl
    def encode(self, model, features):
        return Embeddings(dense=model.encode(features).dense.flatten())


class NotANumber(Toy):
    @hookimpl
    def encode(self, model, features):
        return Embeddings(dense=model.encode(features).dense / 0.0)


class UnsortedIds(Toy):
    heads = ("sparse",)

    @hookimpl
    def encode(self, model, features):
        sparse = model.encode(features).sparse
        return Embeddings(sparse=Sparse(sparse.ids.flip(1), sparse.weights.flip(1)))


class WeighsPadding(Toy):
    heads = ("sparse",)

    @hookimpl
    def encode(self, model, features):
        sparse = model.encode(features).sparse
        return Embeddings(sparse=Sparse(sparse.ids, sparse.weights + 0.1))


class NegativeWeights(Toy):
    heads = ("sparse",)

    @hookimpl
    def encode(self, model, features):
        sparse = model.encode(features).sparse
        return Embeddings(sparse=Sparse(sparse.ids, -sparse.weights))


class ColbertOverPadding(Toy):
    heads = ("colbert",)

    @hookimpl
    def encode(self, model, features):
        found = model.encode(features)
        return Embeddings(colbert=found.colbert + 0.1, mask=found.mask)


class ColbertWithoutMask(Toy):
    heads = ("colbert",)

    @hookimpl
    def encode(self, model, features):
        return Embeddings(colbert=model.encode(features).colbert)


class AlwaysDropout(Toy):
    @hookimpl
    def encode(self, model, features):
        return Embeddings(dense=F.normalize(F.dropout(model.encode(features).dense, 0.1, training=True), dim=-1))


class SeesItsNeighbours(Toy):
    @hookimpl
    def encode(self, model, features):
        dense = model.encode(features).dense
        return Embeddings(dense=F.normalize(dense - 0.1 * dense.mean(0), dim=-1))


class CountsColumns(Toy):
    @hookimpl
    def encode(self, model, features):
        dense = model.encode(features).dense
        return Embeddings(dense=F.normalize(dense + 0.01 * features["input_ids"].shape[1], dim=-1))


class DividesByNothing(Toy):
    @hookimpl
    def encode(self, model, features):
        words = features["attention_mask"].sum(1, keepdim=True) - 2  # without [CLS] and [SEP]
        return Embeddings(dense=F.normalize(model.encode(features).dense * words / words, dim=-1))


class HidesItsLimit(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.tokenizer.model_max_length = int(1e30)
        model.settings.query_max_length = model.settings.passage_max_length = None
        del model.config.max_position_embeddings
        return model


class UnusedLayer(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        torch.manual_seed(0)
        model.extra = torch.nn.Linear(2, 2)
        return model


class ZeroedLayer(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.extra = torch.nn.Parameter(torch.ones(1))
        return model

    @hookimpl
    def encode(self, model, features):
        return Embeddings(dense=model.encode(features).dense + 0 * model.extra)


class Detached(Toy):
    @hookimpl
    def encode(self, model, features):
        return model.encode(features).detach()


class WrongSign(Toy):
    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        return -embedding_loss(query, passage, teacher, step, args)


class WrongPositive(Toy):
    """Takes passage i for query i's positive, whatever the group size."""

    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        scores = query.dense @ passage.dense.T / args.temperature
        return F.cross_entropy(scores, torch.full((len(query),), 1) + args.group_size * torch.arange(len(query)))


class Constant(Toy):
    @hookimpl
    def loss(self, query, passage):
        return (query.dense * 0).sum() + 1


class LooksPastEmbeddings(Toy):
    @hookimpl
    def encode(self, model, features):
        found = model.encode(features)
        model.last = found.dense
        return found

    @hookimpl
    def loss(self, model, query, passage, teacher, step, args):
        return embedding_loss(query, passage, teacher, step, args) + model.last.sum()


class OwnPassagesOnly(Toy):
    @hookimpl
    def loss(self, query, passage, args):
        grouped = passage.dense.view(len(query), args.group_size, -1)
        scores = torch.einsum("qd,qgd->qg", query.dense, grouped) / args.temperature
        return F.cross_entropy(scores, torch.zeros(len(query), dtype=torch.int64))


class ForgetsOthers(Toy):
    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        own = passage[: len(query) * args.group_size]
        return embedding_loss(query, own, teacher, step, args)


class SavesItsOwn(Toy):
    @hookimpl
    def save(self, model, path, state_dict):
        EmbedderAdapter.save(self, model, path, model.state_dict())


class SavesTheOriginal(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.original = str(path)
        return model

    @hookimpl
    def save(self, model, path, state_dict):
        shutil.copytree(model.original, path, dirs_exist_ok=True)


class FreshWeights(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        torch.nn.init.normal_(model.backbone.embeddings.LayerNorm.bias)
        return model


class CountsItsCalls(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.register_buffer("calls", torch.zeros(1))
        return model

    @hookimpl
    def encode(self, model, features):
        model.calls += 1
        return model.encode(features)


class LeavesWeightsOut(Toy):
    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.state_dict = dict  # type: ignore[method-assign]
        return model


class MisleadsOthers(Toy):
    @hookimpl
    def save(self, model, path, state_dict):
        EmbedderAdapter.save(self, model, path, state_dict)
        pooling = Path(path) / "1_Pooling" / "config.json"
        values = json.loads(pooling.read_text())
        pooling.write_text(json.dumps({**values, "pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))

    @hookimpl
    def load(self, path, options):
        model = EmbedderAdapter.load(self, path, options)
        model.settings.pooling = "mean"
        return model


class Crashes(Toy):
    @hookimpl
    def encode(self, model, features):
        raise ZeroDivisionError("oh")


BROKEN = [
    ("load", Half, "is not float32"),
    ("load", UndeclaredHead, "has the head 'sparse', which the adapter does not declare"),
    ("shapes", IgnoresHeads, r"asked for 'dense' alone, 'encode' gave \('dense', 'sparse', 'colbert'\)"),
    ("shapes", NotUnitLength, "a dense vector's length is off by 1"),
    ("shapes", Flat, r"holds float32 of \(320,\) for 10 texts"),
    ("shapes", NotANumber, "not finite"),
    ("shapes", UnsortedIds, "not ascending, repeat, or follow padding"),
    ("shapes", WeighsPadding, "gives padding a weight"),
    ("shapes", NegativeWeights, "negative weights"),
    ("shapes", ColbertOverPadding, "not zero at padding"),
    ("shapes", ColbertWithoutMask, "with the mask NoneType"),
    ("determinism", AlwaysDropout, "encoded twice differs by"),
    ("batch invariance", SeesItsNeighbours, "alone and among others differs by"),
    ("padding", CountsColumns, "3 more columns of padding on the right change a vector by"),
    ("odd texts", DividesByNothing, "the empty text gives values that are not finite"),
    ("odd texts", HidesItsLimit, r"an over-long text \(\d+ tokens\) stops 'encode'"),
    (
        "gradients",
        UnusedLayer,
        "2 of 39 parameters get no gradient when the heads dense are trained, first 'extra.weig",
    ),
    ("gradients", ZeroedLayer, "the gradient of 'extra' is exactly zero"),
    ("gradients", Detached, "the loss has no gradient at all"),
    ("loss falls", Constant, "the loss does not fall in 8 steps of AdamW: it is 1"),
    ("loss falls", Detached, "the loss does not fall"),
    ("loss falls", WrongSign, "the positives' lead over other passages fell too"),
    ("loss falls", WrongPositive, "the positives' lead over other passages fell too"),
    ("gradcache", LooksPastEmbeddings, "--sub_batch_size would train differently"),
    ("other devices", OwnPassagesOnly, "more passages than queries x G stop 'loss'"),
    ("other devices", ForgetsOthers, "with 3 more negatives the loss is"),
    ("save", SavesItsOwn, "after saving and loading, head 'dense' differs by"),
    ("save", ZeroedLayer, "the vectors agree but the fingerprint is another"),
    ("publish", SavesTheOriginal, "Something is lost between the hooks 'save' and 'load'"),
    ("fingerprint", FreshWeights, "the same files loaded twice have two fingerprints"),
    ("fingerprint", CountsItsCalls, "encoding changes the fingerprint"),
    ("fingerprint", LeavesWeightsOut, "changing a weight leaves the fingerprint as it was"),
    ("sentence-transformers", MisleadsOthers, "gives other vectors from the saved folder"),
    ("determinism", Crashes, "ZeroDivisionError: oh"),
]


def model_for(adapter):
    return tiny_m3 if set(adapter.heads) - {"dense"} else tiny_bert


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("check", "adapter", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_adapter_fails_its_check(subject, check, adapter, words):
    broken = subject(adapter(), model_for(adapter))
    if check == "sentence-transformers":
        run_check("publish", broken)
    result = run_check(check, broken)
    assert result.status == "failed"
    assert re.search(words, result.detail), result.detail
    assert result.remedy


def test_every_check_can_fail():
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


@pytest.mark.parametrize("model", [tiny_bert, tiny_m3], ids=lambda value: value.__name__)
def test_the_unbroken_base_passes(register, tmp_path, model):
    adapter = Toy()
    adapter.heads = ("dense",) if model is tiny_bert else ("dense", "sparse", "colbert")
    model(tmp_path / "model")
    report = check_adapter(register(adapter), tmp_path / "model")
    assert report.ok, str(report)


class CrossEncoderModel(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.backbone = AutoModelForSequenceClassification.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.config = self.backbone.config

    def pair_tokens(self, queries, passages, query_max_length, max_length):
        found = self.tokenizer(queries, passages, truncation="only_second", max_length=max_length)
        return Tokens(found["input_ids"])


class Pairs:
    """A cross-encoder: pairs in, scores out."""

    heads = ("scores",)
    pair_input = True
    sign = 1

    @hookimpl
    def load(self, path):
        return CrossEncoderModel(path)

    @hookimpl
    def encode(self, model, features):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        return Embeddings(scores=model.backbone(**inputs).logits[:, 0])

    @hookimpl
    def loss(self, passage, teacher, args):
        return cross_encoder_loss(self.sign * passage.scores, teacher, args)

    @hookimpl
    def save(self, model, path, state_dict):
        part = {name.removeprefix("backbone."): tensor for name, tensor in state_dict.items()}
        model.backbone.save_pretrained(path, state_dict=part)
        model.tokenizer.save_pretrained(path)


def test_a_cross_encoder_is_checked_on_pairs(register, tmp_path):
    tiny_cross_encoder(tmp_path / "model")
    report = check_adapter(register(Pairs()), tmp_path / "model")
    assert report.ok, str(report)
    assert report["shapes"].detail == "scores (4,)"
    assert report["other devices"].status == "not applicable"
    assert report["sentence-transformers"].detail.startswith("same scores")


def test_a_cross_encoder_that_learns_backwards_fails(subject):
    adapter = Pairs()
    adapter.sign = -1
    assert "the positives' lead" in run_check("loss falls", subject(adapter, tiny_cross_encoder)).detail


def test_a_plugin_that_is_refused_is_a_failed_report():
    report = check_adapter("bge-m4")
    assert not report.ok
    assert report["hooks"].detail.startswith("no adapter is called 'bge-m4'; did you mean 'bgem3'?")


def test_a_model_that_does_not_load_stops_the_rest(register, tmp_path):
    (tmp_path / "empty").mkdir()
    report = check_adapter(register(Toy()), tmp_path / "empty")
    assert [result.check for result in report.failed] == ["load"]
    assert report["save"].detail == "the model did not load"


def test_an_adapter_without_example_needs_a_path(register):
    with pytest.raises(UsageError, match=r"adapter 'toy' has no example model: name a model with --path"):
        check_adapter(register(Toy()))


def test_a_plugin_may_bring_its_example(register):
    adapter = Toy()
    adapter.example_model = tiny_bert
    assert check_adapter(register(adapter)).ok


def test_command_prints_a_report_and_exits_with_its_verdict(register, capsys):
    assert main(["plugins", "check", "bge"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "adapter 'bge' of package 'ultrarag' 0.1.0, model its example"
    assert lines[1].split()[:3] == ["ok", "hooks", "load,"]
    assert lines[-1] == f"{len(CHECKS) + 1} ok, 0 failed, 0 not applicable"
    broken = NotUnitLength()
    broken.example_model = tiny_bert
    assert main(["plugins", "check", register(broken), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    failed = [result for result in report["results"] if result["status"] == "failed"]
    assert [result["check"] for result in failed] == ["shapes", "sentence-transformers"]
    assert main(["plugins", "check", "bge", "--path", "/does/not/exist"]) == 2
    assert "no model folder '/does/not/exist'" in capsys.readouterr().err
