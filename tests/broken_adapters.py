"""Adapters that are each broken in one way, with the check of the conformance kit that must say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from ultrarag import Embeddings, Sparse, hookimpl
from ultrarag.adapters import EmbedderAdapter
from ultrarag.losses import embedding_loss


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


#: (check, adapter, what its result says)
class ComputesWithAWeight(Toy):
    @hookimpl
    def encode(self, model, features):
        weight = model.backbone.encoder.layer[0].attention.self.query.weight
        return Embeddings(dense=F.normalize(model.encode(features).dense + weight[0], dim=-1))


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
    ("lora", ComputesWithAWeight, "merging the adapters into the weights changes the vectors: by"),
    ("save", SavesItsOwn, "after saving and loading, head 'dense' differs by"),
    ("save", ZeroedLayer, "the vectors agree but the fingerprint is another"),
    ("publish", SavesTheOriginal, "Something is lost between the hooks 'save' and 'load'"),
    ("fingerprint", FreshWeights, "the same files loaded twice have two fingerprints"),
    ("fingerprint", CountsItsCalls, "encoding changes the fingerprint"),
    ("fingerprint", LeavesWeightsOut, "changing a weight leaves the fingerprint as it was"),
    ("sentence-transformers", MisleadsOthers, "gives other vectors from the saved folder"),
    ("determinism", Crashes, "ZeroDivisionError: oh"),
]
