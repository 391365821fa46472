"""What libraries below the engines do differently (docs/backends.md), and every engine must do as numpy does."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from tests.retrieve.engines.test_engines import DIM, TOKEN_DIM, embed, empty, filled, name, names  # noqa: F401
from ultrarag.errors import UsageError
from ultrarag.retrieve.engines.registry import Backend, open_backend
from ultrarag.types import Sparse

#: Values that Python, JSON and the engines take for one another: true for 1, null for what is missing or empty.
ALIKE = [
    *(0, 1, 0.0, -0.0, 1.0, True, False, "1", "true", "", "null", None),
    *(
        [],
        {},
        [None],
        [[]],
        [None, None],
        [None, 1],
        [None, True],
        [0, None, "x"],
        [True, 1],
        [False],
        [{}],
        [{"b": None}],
    ),
    *({"b": None}, {"b": 1}, {"b": True}, {"b": []}, [{"b": 1}, {"b": None}], [[1], [True]]),
]


def leaves(value: object, path: str = "") -> list[tuple[str, object]]:
    """What a passage's metadata holds where; null, empty lists and empty objects hold nothing."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, path)]
    return [] if value is None else [(path, value)]


def passes(metadata: dict, key: str, asked: object) -> bool:
    """The meaning of one condition, written down a second time."""
    found = [value for path, value in leaves(metadata) if path == f".{key}"]
    if isinstance(asked, list):
        return any(passes(metadata, key, one) for one in asked)
    if isinstance(asked, dict):
        numbers = [value for value in found if isinstance(value, int | float) and not isinstance(value, bool)]
        return any(asked["gte"] <= number < asked["lt"] for number in numbers)
    if asked is None:
        return not any(f"{path}.".startswith(f".{key}.") for path, _ in leaves(metadata))
    return any(value == asked and isinstance(value, bool) == isinstance(asked, bool) for value in found)


def test_true_is_not_1_and_null_is_absent_also_in_lists(empty: Backend) -> None:  # noqa: F811
    rows = [*({"a": value} for value in ALIKE), {}, {"b": 1}]
    empty.upsert(names(len(rows)), embed(len(rows)), rows)
    scalars = [None, True, False, 1, 0, 1.0, "1", "true", "", "null"]
    asked = [*scalars, *(list(pair) for pair in combinations(scalars[:5], 2)), {"gte": 0, "lt": 1}, {"gte": 1, "lt": 2}]
    for key, choice in product(("a", "a.b"), asked):
        wanted = {f"p{row}" for row, held in enumerate(rows) if passes(held, key, choice)}
        assert {id for id, _ in empty.search_dense(np.ones(DIM), 100, {key: choice})} == wanted, (key, choice)
        others = {id for id, _ in empty.search_dense(np.ones(DIM), 100, {"not": {key: choice}})}
        assert others == {*names(len(rows))} - wanted, (key, choice)


def test_a_weight_of_zero_is_no_weight(filled: Backend) -> None:  # noqa: F811
    batch = embed(3, seed=6)
    batch.sparse = Sparse(np.array([[4, 17], [4, 17], [4, 17]]), np.array([[0, -0.0], [0, 1.5], [2, 0]], np.float32))
    filled.upsert(["none", "one", "other"], batch, [{"new": True}] * 3)
    new = {"new": True}
    assert filled.vectors(["none", "one", "other"]).sparse.to_dicts() == [{}, {17: 1.5}, {4: 2.0}]
    assert len(filled.search_dense(np.ones(DIM), 100, new)) == 3
    assert filled.search_sparse([4, 17], [0.5, 2.0], 100, new) == [("one", 3.0), ("other", 1.0)]
    assert filled.search_sparse([4, 17], [0.0, 2.0], 100) == filled.search_sparse([17], [2.0], 100)
    assert filled.search_sparse([4, 17], [0.0, 0.0], 100) == []
    assert filled.score_sparse([4, 17], [0.5, 2.0], ["none", "one", "other"]).tolist() == [0, 3, 1]
    assert filled.score_sparse([4, 17], [0.0, 0.0], ["none", "one", "unknown"]).tolist() == pytest.approx(
        [0, 0, np.nan], nan_ok=True
    )


def test_vectors_keep_their_length_and_one_of_zeros_is_found(empty: Backend) -> None:  # noqa: F811
    batch = embed(5)
    batch.dense = batch.dense[:1] * np.array([[0], [1], [1000], [-2], [0]], np.float32)
    query = batch.dense[1]
    empty.upsert(["z", "one", "long", "against", "a"], batch, [{}] * 5)
    square = float(query @ query)
    for exact in (False, True):
        hits = empty.search_dense(query, 5, exact=exact)
        assert [id for id, _ in hits] == ["long", "one", "a", "z", "against"]
        assert [score for _, score in hits] == pytest.approx([1000 * square, square, 0, 0, -2 * square], rel=1e-5)
        zeros = empty.search_dense(np.zeros(DIM), 5, exact=exact)
        assert zeros == [(id, 0.0) for id in ("a", "against", "long", "one", "z")]
    np.testing.assert_array_equal(empty.vectors(["z", "long"]).dense, batch.dense[[0, 2]])


def test_ties_of_late_interaction_come_in_the_order_of_ids_for_every_k(empty: Backend) -> None:  # noqa: F811
    batch, ids = embed(1)[np.zeros(23, int)], [f"p{(7 * row) % 23:02}" for row in range(23)]
    batch.colbert = batch.colbert.copy()
    batch.colbert[11] *= 2
    query = embed(1).colbert[0][embed(1).mask[0] == 1]
    if type(empty).__name__.startswith("Milvus"):
        with pytest.raises(UsageError, match="Milvus server gives late interaction"):
            empty.search_tokens(query, 1)
        return
    wanted = [ids[11], *sorted({*ids} - {ids[11]})]
    for order in (np.arange(23), np.arange(23)[::-1]):
        empty.delete(ids)
        empty.upsert([ids[row] for row in order], batch[order], [{"n": 1}] * 23)
        for k in range(1, 25):
            for filter in (None, {"n": 1}):
                assert [id for id, _ in empty.search_tokens(query, k, filter)] == wanted[:k], k


def test_deletions_change_no_score_of_the_others(filled: Backend) -> None:  # noqa: F811
    """Of lexical weights too: they are the model's, and no engine multiplies them by how rare a token is."""
    query, gone, kept = embed(1, seed=8), names(40), names(60)[40:]
    (asked,) = query.sparse.to_dicts()

    def check(filter: dict | None) -> None:
        found = [
            filled.search_dense(query.dense[0], 60, filter, exact=True),
            filled.search_sparse(query.sparse.ids[0], query.sparse.weights[0], 60, filter),
            list(zip(kept, filled.maxsim(query.colbert[0], kept).tolist(), strict=True)),
        ]
        assert [[id for id, _ in hits] for hits in found] == [[id for id, _ in hits] for hits in wanted]
        for hits, expected in zip(found, wanted, strict=True):
            np.testing.assert_allclose([score for _, score in hits], [score for _, score in expected], rtol=1e-5)

    stored = embed(60)[np.arange(40, 60)]
    lexical = [
        sum(held.get(token, 0.0) * weight for token, weight in asked.items()) for held in stored.sparse.to_dicts()
    ]
    scores = [stored.dense @ query.dense[0], np.array(lexical), filled.maxsim(query.colbert[0], kept)]
    wanted = [[(kept[row], score[row]) for row in np.argsort(-score, kind="stable")] for score in scores[:2]]
    wanted[1] = [hit for hit in wanted[1] if hit[1]]
    wanted.append(list(zip(kept, scores[2].tolist(), strict=True)))
    check({"n": {"gte": 40}})
    filled.delete(gone)
    check(None)
    filled.optimize()
    check(None)
    filled.upsert(gone, embed(40, seed=3), [{}] * 40)
    check({"n": {"gte": 40}})


@pytest.mark.parametrize("layout", ["fortran", "backwards", "every second", "float64", "big endian"])
def test_arrays_of_any_layout_are_stored_as_they_read(empty: Backend, layout: str) -> None:  # noqa: F811
    changed = {
        "fortran": np.asfortranarray,
        "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
        "every second": lambda a: a.repeat(2, axis=-1)[..., ::2],
        "float64": lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a,
        "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    }[layout]
    stored = embed(6)
    empty.upsert(names(6), stored.map(changed), [{}] * 6)
    hits = empty.search_dense(changed(stored.dense)[3], 6)
    assert hits == empty.search_dense(stored.dense[3], 6)
    assert hits[0][1] == pytest.approx(float((stored.dense @ stored.dense[3]).max()), rel=1e-5)
    empty.close()
    again = open_backend(empty.directory)
    held = again.vectors(names(6))
    again.close()
    np.testing.assert_array_equal(held.dense, stored.dense)
    assert held.sparse.to_dicts() == stored.sparse.to_dicts()
    for row in range(6):
        np.testing.assert_array_equal(
            held.colbert[row][held.mask[row] == 1], stored.colbert[row][stored.mask[row] == 1]
        )
    assert held.colbert.shape[-1] == TOKEN_DIM
