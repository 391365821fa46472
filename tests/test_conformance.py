"""The conformance kit: every built-in adapter passes it, and every check fails for an adapter that is broken so."""

from __future__ import annotations

import json
import re

import pytest
import torch

from tests.broken_adapters import BROKEN, NotUnitLength, Toy
from ultrarag import Embeddings, hookimpl
from ultrarag.cli import main
from ultrarag.errors import UsageError
from ultrarag.losses import cross_encoder_loss
from ultrarag.plugins import registry
from ultrarag.testing import CHECKS, check_adapter, run_check
from ultrarag.testing.examples import EXAMPLES
from ultrarag.testing.subject import Subject
from ultrarag.testing.tiny import tiny_bert, tiny_cross_encoder, tiny_m3
from ultrarag.types import Tokens

#: Checks that a built-in adapter may be excused from, with the reason that the report gives.
_PAIRS = {"other devices": "a cross-encoder has no in-batch negatives"}
_NO_CROSS_ENCODER = "a {} is no CrossEncoder of sentence-transformers"
EXCUSED = {
    "bge-reranker": _PAIRS,
    "bge-reranker-gemma": {**_PAIRS, "sentence-transformers": _NO_CROSS_ENCODER.format("GemmaForCausalLM")},
    "causal-reranker": _PAIRS,
    "bge-reranker-minicpm-layerwise": {
        **_PAIRS,
        "sentence-transformers": _NO_CROSS_ENCODER.format("GraniteModel"),
    },
    "colbert": {"sentence-transformers": "the model has no dense head"},
    "static": {"lora": "the model has no linear layer"},
}


def built_in() -> list[str]:
    return [row.name for row in registry().plugins() if row.kind == "adapter" and row.package == "ultrarag-retrieval"]


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
    assert lines[0] == "adapter 'bge' of package 'ultrarag-retrieval' 0.1.0, model its example"
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
