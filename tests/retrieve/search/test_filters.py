"""The filter language: what it means, and that every engine agrees."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve.bm25.index import BM25
from ultrarag.retrieve.engines.registry import BACKENDS, Schema, create, open_backend
from ultrarag.retrieve.search.filters import facts, matches, parse
from ultrarag.types import Embeddings

MEANING = [
    ({"lang": "en"}, {"lang": "en"}, True),
    ({"lang": "en"}, {"lang": "EN"}, False),
    ({"lang": "en"}, {}, False),
    ({"lang": ["en", "zh"]}, {"lang": "zh"}, True),
    ({"lang": "en"}, {"lang": ["zh", "en"]}, True),
    ({"year": 2020}, {"year": 2020.0}, True),
    ({"year": 2020}, {"year": "2020"}, False),
    ({"flag": True}, {"flag": 1}, False),
    ({"flag": 1}, {"flag": True}, False),
    ({"year": {"gte": 2020, "lt": 2024}}, {"year": 2020}, True),
    ({"year": {"gte": 2020, "lt": 2024}}, {"year": 2024}, False),
    ({"year": {"gt": 2020}}, {"year": 2020}, False),
    ({"year": {"lte": 2020}}, {"year": 2020}, True),
    ({"year": {"gte": 2020}}, {}, False),
    ({"year": {"gte": 2020}}, {"year": "2021"}, False),
    ({"flag": {"gte": 0}}, {"flag": True}, False),
    ({"n": {"gt": 2, "lt": 4}}, {"n": [1, 5]}, False),
    ({"n": {"gt": 2, "lt": 4}}, {"n": [1, 3]}, True),
    ({"day": {"gte": "2024-01-01"}}, {"day": "2024-05-01"}, True),
    ({"day": {"lt": "2024-01-01T12:00:00Z"}}, {"day": "2024-01-01T14:00:00+02:30"}, True),
    ({"day": {"gte": "2024-01-01"}}, {"day": "2024-13-99"}, False),
    ({"day": {"gte": "2024-01-01T00:00:00.25"}}, {"day": "2024-01-01T00:00:00.3"}, True),
    ({"source.name": "wiki"}, {"source": {"name": "wiki"}}, True),
    ({"source.name": "wiki"}, {"source.name": "wiki"}, True),
    ({"authors.name": "Li"}, {"authors": [{"name": "Wu"}, {"name": "Li"}]}, True),
    ({"not": {"lang": "en"}}, {}, True),
    ({"not": {"lang": "en"}}, {"lang": "en"}, False),
    ({"lang": None}, {}, True),
    ({"lang": None}, {"lang": None}, True),
    ({"lang": None}, {"lang": []}, True),
    ({"lang": None}, {"lang": [None]}, True),
    ({"lang": None}, {"lang": [None, "en"]}, False),
    ({"not": {"lang": ["en", "zh"]}}, {"lang": None}, True),
    ({"lang": None}, {"lang": "en"}, False),
    ({"source": None}, {"source": {"name": "wiki"}}, False),
    ({"lang": ["en", None]}, {}, True),
    ({"and": [{"a": 1}, {"b": 2}]}, {"a": 1, "b": 2}, True),
    ({"and": [{"a": 1}, {"b": 2}]}, {"a": 1}, False),
    ({"or": [{"a": 1}, {"b": 2}]}, {"b": 2}, True),
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, False),
    ({"text": "x" * 500}, {"text": "x" * 500}, True),
    ({"text": "x" * 500}, {"text": "x" * 499 + "y"}, False),
    ({"odd\ud800": "\x00"}, {"odd\ud800": "\x00"}, True),
    ({}, {}, True),
]


@pytest.mark.parametrize(("filter", "metadata", "expected"), MEANING)
def test_meaning(filter: dict, metadata: dict, expected: bool) -> None:
    assert matches(parse(filter), metadata) is expected


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ("lang=en", "a filter is a mapping"),
        ({"year": {"get": 2020}}, "'year' has the unknown bound 'get'; did you mean 'gt'"),
        ({"source": {"name": "wiki"}}, "'source.name'"),
        ({"year": {}}, "'year' has no bound"),
        ({"year": {"gte": True}}, "'year': bound 'gte' is True"),
        ({"year": {"gte": 2020, "lt": "2024-01-01"}}, "'year': bound 'gte' is 2020"),
        ({"year": {"gte": "soon"}}, "'year': bound 'gte' is 'soon'"),
        ({"year": {"gte": float("nan")}}, "'year'"),
        ({"year": float("inf")}, "'year' can equal"),
        ({"lang": []}, "'lang' lists no value"),
        ({"lang": [["en"]]}, "'lang' can equal"),
        ({"and": []}, "'and' needs a list"),
        ({"or": {"a": 1}}, "'or' needs a list"),
        ({"not": {}}, "'not' holds an empty filter"),
        ({"and": [{"or": [{"x": {"lt": None}}]}]}, "'x': bound 'lt' is None"),
        ({3: 1}, "not 3"),
    ],
)
def test_errors_name_the_key(filter: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(filter)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), object(), {"b": {1, 2}}, 10**400])
def test_metadata_must_be_json(value: object) -> None:
    with pytest.raises(DataError, match="'a"):
        facts({"a": value})


def test_facts_are_remembered_by_type_too() -> None:
    for _ in range(2):
        kinds = {json.dumps(value): facts({"a": value}) for value in (True, 1, 1.0, "1", False, 0, "true")}
        assert kinds["1"] == kinds["1.0"] != kinds["true"]
        assert len({str(found) for found in kinds.values()}) == 6
        assert facts({"a": 1})[0] == ('?"a"', 1.0)
        long = facts({"a": "x" * 1000})
        assert facts({"a": "x" * 1000}) == long != facts({"a": "x" * 999})


def _random_value(rng: random.Random, depth: int = 0) -> object:
    kinds = ["str", "int", "float", "bool", "none", "date", "list", "object"]
    kind = rng.choice(kinds if depth < 2 else kinds[:6])
    if kind == "list":
        return [_random_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == "object":
        return {name: _random_value(rng, depth + 1) for name in rng.sample("ab", rng.randrange(3))}
    return _random_scalar(rng, kind)


def _random_scalar(rng: random.Random, kind: str) -> object:
    return {
        "str": rng.choice(["x", "1", "é\"'\\", "中文", "true", ""]),
        "int": rng.randrange(-2, 4),
        "float": rng.choice([-1.5, 0.5, 1.0, 2.0, 1e300]),
        "bool": rng.random() < 0.5,
        "none": None,
        "date": rng.choice(["2024-01-01", "2024-06-01T10:00:00Z", "2025-01-01"]),
    }[kind]


def _random_filter(rng: random.Random, depth: int = 0) -> dict:
    kind = rng.choice(["equal", "in", "range", "dates", "and", "or", "not"] if depth < 3 else ["equal", "range"])
    if kind in ("and", "or"):
        return {kind: [_random_filter(rng, depth + 1) for _ in range(rng.randrange(1, 3))]}
    if kind == "not":
        return {kind: _random_filter(rng, depth + 1)}
    key = rng.choice(["a", "b", "a.b", "b.a", "a.a", "c[0]", "d e.f"])
    if kind == "range":
        return {key: {name: rng.choice([-1.5, 0, 1, 2]) for name in rng.sample(["gt", "gte", "lt", "lte"], 2)}}
    if kind == "dates":
        return {key: {rng.choice(["gte", "lt"]): "2024-06-01"}}
    scalars = [_random_scalar(rng, k) for k in rng.sample(["str", "int", "float", "bool", "none", "date"], 3)]
    return {key: scalars[0] if kind == "equal" else scalars}


class Lexical:
    """BM25 over passages of one word, filled and searched as an engine is."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.index = directory, BM25.create(directory)

    def upsert(self, ids: list[str], embeddings: Embeddings, payloads: list[dict]) -> None:
        self.index.upsert(ids, ["word"] * len(ids), payloads)

    def search_dense(self, vector: np.ndarray, k: int, filter: dict) -> list[tuple[str, float]]:
        return self.index.search("word", k, filter)

    def optimize(self) -> None:
        self.index.vacuum()

    def close(self) -> None:
        self.index.close()

    def open_again(self) -> Lexical:
        self.index = BM25.open(self.directory)
        return self


@pytest.mark.parametrize("name", [*BACKENDS, "bm25"])
def test_engines_agree_with_the_predicate_on_random_filters(name: str, tmp_path: Path) -> None:
    """Also of passages written before a key was seen, and after `optimize`: indexes of metadata change no answer."""
    if library := {"qdrant-edge": "qdrant_edge", "ivf": "faiss"}.get(name):
        pytest.importorskip(library)
    rng = random.Random(5)
    keys = ["a", "b", "c[0]", "d e", "a.b"]
    rows = [{key: _random_value(rng) for key in rng.sample(keys, rng.randrange(4))} for _ in range(150)]
    path = tmp_path / "index"
    backend = Lexical(path) if name == "bm25" else create(path, Schema(dense=2), name)
    for start in range(0, 150, 30):
        batch = Embeddings(dense=np.ones((30, 2), np.float32))
        backend.upsert([str(i) for i in range(start, start + 30)], batch, rows[start : start + 30])
    filters = [_random_filter(rng) for _ in range(200)]
    expected = [{str(i) for i, row in enumerate(rows) if matches(parse(filter), row)} for filter in filters]
    assert len({len(ids) for ids in expected}) > 30, "the filters must tell rows apart"

    def check() -> None:
        for filter, ids in zip(filters, expected, strict=True):
            assert {id for id, _ in backend.search_dense(np.ones(2), len(rows), filter)} == ids, filter

    check()
    backend.optimize()
    check()
    backend.close()
    backend = backend.open_again() if isinstance(backend, Lexical) else open_backend(path)
    check()
    backend.close()
