"""One search of a table by lexical weights: exact, for postings bound from above what a row can score.

Rows that have no postings yet are few, and all are scored; so are those that pass where few do. What postings find is
scored anew by the weights as they were given.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.packages import install
from ultrarag.retrieve.engines.ivf.postings import Postings
from ultrarag.retrieve.engines.ivf.table import Table
from ultrarag.retrieve.engines.ivf.weights import Weights, stored
from ultrarag.retrieve.ranking import Scored, ranked, top
from ultrarag.retrieve.search import Filter, mask, parse

#: Rows without postings from which on they get some: to score 4,096 takes 0.6 ms.
TAIL_ROWS = 4096
#: Rows of a part at most (it is made in 20 bytes of memory a weight); before each is one more than twice as large.
MOST_ROWS = 1 << 20
#: As few that pass a filter are scored one by one.
FEW = 1000
#: Of a query with a smaller weight, and where a score may be larger, all rows are scored: bounds are of float32.
SMALLEST, LARGEST = 1e-15, 1e30

logger = logging.getLogger("ultrarag")


def is_here() -> bool:
    """Whether the compiler of the loops is installed, and can be imported: else another engine holds the weights."""
    if find_spec("numba") is None:
        return False
    if reason := _refusal():
        logger.warning("numba%s: new indexes hold their lexical weights in another engine", reason)
    return not reason


def check_compiler() -> None:
    """Raise UsageError where a table keeps lexical weights and their loops cannot be compiled."""
    if not is_here():
        raise UsageError(f"the lexical weights of this engine 'ivf' need numba{_refusal()}: {install('numba')}")


def _refusal() -> str:
    """Why numba cannot be imported where it is installed, as with a numpy too new for it; empty where it can."""
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError as error:
        return "" if error.name == "numba" else f" (it is installed, but: {error})"
    except ImportError as error:
        return f" (it is installed, but: {error})"
    return ""


def search(table: Table, tokens: np.ndarray, weights: np.ndarray, k: int, filter: Filter = None) -> list[Scored]:
    """The k best passages that share a token with the query.

    Args:
        tokens: of the query, ascending, int64.
        weights: of the query, above 0, float32.
    """
    node, held, count = parse(filter), _weights(table), table.count
    tokens, weights = stored(tokens, weights)
    passing: np.ndarray | None = None if count == table.rows else table.alive()
    if node is not None:
        passing = table.alive() & mask(node, table.lookup.get, table.rows)
        count = int(np.count_nonzero(passing))
    if passing is not None and count <= FEW:
        rows = np.flatnonzero(passing)
        return _best(table, rows, scores_of(held, rows, tokens, weights), k)
    parts = sorted(table.postings, key=lambda part: -part.count) if _bounded(table, weights) else []
    first = max((part.last for part in parts), default=0)
    rows, scores = _of_tail(held, first, table.rows, tokens, weights, passing)
    for part in parts:
        floor = _floor(scores, k)
        found = part.promising(tokens, weights, k, floor, passing)
        rows, scores = np.append(rows, found), np.append(scores, scores_of(held, found, tokens, weights))
        kept = top(scores, k)
        rows, scores = rows[kept], scores[kept]
    return _best(table, rows, scores, k)


def scores_of(held: Weights, rows: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Lexical scores of some rows, (len(rows),) float64."""
    return _products(*held.of_rows(rows), tokens, weights)


def due(parts: Sequence[Postings], rows: int) -> tuple[int, int] | None:
    """The rows whose postings are to be made, of a table with so many: those without, and small parts."""
    first = parts[-1].last if parts else 0
    if rows - first < TAIL_ROWS:
        return None
    last = min(rows, first + MOST_ROWS)
    for part in reversed(parts):
        if part.count > 2 * (last - first) or last - part.first > MOST_ROWS:
            break
        first = part.first
    return first, last


def with_postings(table: Table) -> list[Postings]:
    """The parts that the table has when those that are due are made."""
    parts = list(table.postings)
    while found := due(parts, table.rows):
        parts = [*(part for part in parts if part.last <= found[0]), _written(table, *found)]
    return parts


def with_fewest(table: Table) -> list[Postings]:
    """The same in as few parts as there can be, of all rows."""
    if table.rows < TAIL_ROWS:
        return list(table.postings)
    parts = {(part.first, part.last): part for part in table.postings}
    wanted = [(first, min(first + MOST_ROWS, table.rows)) for first in range(0, table.rows, MOST_ROWS)]
    return [parts.get(part) or _written(table, *part) for part in wanted]


def _written(table: Table, first: int, last: int) -> Postings:
    path = table.postings_path(first, last)
    Postings.write(path, *_weights(table).of(first, last))
    return Postings.read(path, first, last)


def _weights(table: Table) -> Weights:
    assert table.weights is not None
    return table.weights


def _bounded(table: Table, weights: np.ndarray) -> bool:
    most = float(np.sum(weights, dtype=np.float64)) * _weights(table).heaviest
    return float(weights.min(initial=1.0)) >= SMALLEST and most < LARGEST


def _of_tail(
    held: Weights, first: int, last: int, tokens: np.ndarray, weights: np.ndarray, passing: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The rows from `first` on that pass, and their scores."""
    scores = _products(*held.mapped(first, last), tokens, weights)
    kept = scores > 0 if passing is None else (scores > 0) & passing[first:last]
    return np.flatnonzero(kept) + first, scores[kept]


def _products(pairs: np.ndarray, starts: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    from ultrarag.retrieve.engines.ivf import kernels

    if not len(pairs) or not len(tokens):
        return np.zeros(len(starts) - 1)
    found: np.ndarray = kernels.products(pairs, starts, tokens, weights)
    return found


def _floor(scores: np.ndarray, k: int) -> float:
    """What a hit scores at least; a little less, for scores of float32."""
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) * (1 - 1e-6) if len(scores) >= k else 0.0


def _best(table: Table, rows: np.ndarray, scores: np.ndarray, k: int) -> list[Scored]:
    rows, scores = rows[scores > 0], scores[scores > 0]
    places = top(scores, k)
    return ranked([table.id_of(row) for row in rows[places].tolist()], scores[places], k)
