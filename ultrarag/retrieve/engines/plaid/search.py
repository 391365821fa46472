"""One search by token vectors over a table: the candidates that lists give, or all rows that pass, scored by codes."""

from __future__ import annotations

import numpy as np

from ultrarag.retrieve.engines.ivf import Table
from ultrarag.retrieve.engines.plaid.lists import Lists
from ultrarag.retrieve.engines.plaid.tokens import Tokens
from ultrarag.retrieve.ranking import Scored, ranked, through_ties, top

#: As few that pass are all compared: 1,000 of 100,000 take 28 ms, by lists, of which more are looked into then, 41.
FEW = 1000
#: Candidates scored by their codes for each hit, and at least.
OVERSAMPLING, LEAST_CANDIDATES = 8, 400
#: The best of these that are scored anew by all that is stored of them, for each hit, and at least.
RESCORED, LEAST_RESCORED = 2, 64


def search(
    table: Table, tokens: Tokens, lists: Lists | None, query: np.ndarray, k: int, passing: np.ndarray, exact: bool
) -> list[Scored]:
    """The k best passages for query tokens, (tokens, dim); all are compared where `exact`, where few pass, and
    without lists.

    Args:
        passing: which rows may be found, (rows,) bool.
    """
    held = int(np.count_nonzero(passing))
    whole = exact or not tokens.refined

    def among_all(hits: int) -> list[Scored]:
        return _best(table, tokens, query, np.flatnonzero(passing), hits, whole)

    if exact or lists is None or held <= FEW:
        return through_ties(among_all, k)

    def among_candidates(hits: int) -> list[Scored]:
        count = max(LEAST_CANDIDATES, OVERSAMPLING * hits)
        return _best(table, tokens, query, lists.search(query, count, passing, held / table.rows), hits, whole)

    return through_ties(among_candidates, k, among_all)


def maxsim(tokens: Tokens, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """MaxSim of query tokens with rows, (len(rows),): one row at a time, so that equal ones get equal scores."""
    if not len(query):
        return np.zeros(len(rows))
    each = (tokens.coder.products(query, codes) for codes in tokens.each(rows))
    return np.array([float(found.max(0).mean()) if len(found) else 0.0 for found in each], np.float64)


def _best(table: Table, tokens: Tokens, query: np.ndarray, rows: np.ndarray, k: int, whole: bool) -> list[Scored]:
    """The k best of some rows.

    Args:
        whole: compare all by all that is stored of them; else only those that are the best by their codes.
    """
    rows = rows[tokens.counts(rows) > 0]
    if not whole:
        rows = _nearest(tokens, query, rows, max(LEAST_RESCORED, RESCORED * k), False)
    rows = _nearest(tokens, query, rows, k, True)
    scores = maxsim(tokens, query, rows)
    places = top(scores, k)
    return ranked([table.id_of(row) for row in rows[places].tolist()], scores[places], k)


def _nearest(tokens: Tokens, query: np.ndarray, rows: np.ndarray, count: int, whole: bool) -> np.ndarray:
    """The `count` best of rows, and those that come so near that rounding may have let them fall behind: products of
    many rows at a time depend on who is beside whom."""
    if len(rows) <= count:
        return rows
    near = np.concatenate([_near(tokens, query, part, whole) for part in tokens.blocks(rows)])
    slack = 1e-5 * tokens.norm * float(np.linalg.norm(query, axis=1).mean())
    return rows[near >= np.partition(near, len(near) - count)[len(near) - count] - slack]


def _near(tokens: Tokens, query: np.ndarray, rows: np.ndarray, whole: bool) -> np.ndarray:
    """MaxSim with rows that all have tokens, up to rounding."""
    codes, counts = tokens.read(rows, whole)
    best = np.maximum.reduceat(tokens.coder.products(query, codes), np.cumsum(counts) - counts, axis=0)
    return best.mean(1)
