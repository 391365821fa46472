"""Kernels of the contender `Blocks`: building and searching blocks of alike rows, compiled by numba."""

from __future__ import annotations

import numba
import numpy as np
from sparse_vectors import Rows

kernel = numba.njit(nogil=True, boundscheck=False, fastmath=True)


def build(rows: Rows, size: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Rows ordered by their four largest weights' tokens, and of each token the blocks that hold it."""
    starts, ids, weights = rows
    order = np.lexsort(leading(starts, ids, weights, 4).T[::-1])
    step = float(weights.max()) / 255
    held = np.clip(np.round(weights / step), 1, 255).astype(np.uint8)
    starts, ids, held = ordered(starts, ids.astype(np.uint16), held, order)
    places, blocks, most = maxima(starts, ids, held, size, vocabulary)
    return {
        "order": order,
        "starts": starts,
        "ids": ids,
        "held": held,
        "places": places,
        "blocks": blocks,
        "most": most,
    }


class Searcher:
    """What `build` made, with room for one search at a time."""

    def __init__(self, size: int, vocabulary: int, **arrays: np.ndarray) -> None:
        self.size, self.arrays = size, arrays
        self.query = np.zeros(vocabulary, np.float32)
        self.bounds = np.zeros(-(-(len(arrays["starts"]) - 1) // size), np.float32)

    def search(self, ids: np.ndarray, weights: np.ndarray, k: int, share: float) -> np.ndarray:
        """The k best rows, the best first."""
        held = (self.arrays[name] for name in ("starts", "ids", "held", "places", "blocks", "most"))
        rows, scores = best(ids, weights, *held, self.size, self.query, self.bounds, k, share)
        found: np.ndarray = rows[np.argsort(-scores, kind="stable")]
        return found[found >= 0]


@kernel
def leading(starts, ids, weights, count):
    """The tokens of the largest weights of each row, (rows, count)."""
    found = np.zeros((len(starts) - 1, count), np.int64)
    for row in range(len(starts) - 1):
        order = np.argsort(-weights[starts[row] : starts[row + 1]])[:count]
        for place in range(len(order)):
            found[row, place] = ids[starts[row] + order[place]]
    return found


@kernel
def ordered(starts, ids, weights, order):
    """The rows in another order."""
    begins, tokens, held = np.zeros_like(starts), np.empty_like(ids), np.empty_like(weights)
    for place in range(len(order)):
        first, length = starts[order[place]], starts[order[place] + 1] - starts[order[place]]
        begins[place + 1] = begins[place] + length
        for at in range(length):
            tokens[begins[place] + at], held[begins[place] + at] = ids[first + at], weights[first + at]
    return begins, tokens, held


@kernel
def maxima(starts, ids, weights, size, vocabulary):
    """For each token where its blocks begin, the blocks that hold it, and its largest weight in each."""
    rows, places, last = len(starts) - 1, np.zeros(vocabulary + 1, np.int64), np.full(vocabulary, -1)
    for row in range(rows):
        for at in range(starts[row], starts[row + 1]):
            if last[ids[at]] != row // size:
                last[ids[at]] = row // size
                places[ids[at] + 1] += 1
    places = np.cumsum(places)
    ends, blocks, most = places.copy(), np.empty(places[-1], np.int32), np.empty(places[-1], np.uint8)
    last[:] = -1
    for row in range(rows):
        for at in range(starts[row], starts[row + 1]):
            token = ids[at]
            if last[token] != row // size:
                last[token] = row // size
                blocks[ends[token]], most[ends[token]] = row // size, weights[at]
                ends[token] += 1
            elif weights[at] > most[ends[token] - 1]:
                most[ends[token] - 1] = weights[at]
    return places, blocks, most


@kernel
def best(tokens, weights, starts, ids, held, places, blocks, most, size, query, bounds, k, share):
    """The k best rows and their scores, in no order; -1 where there are fewer."""
    bounds[:] = 0
    for at in range(len(tokens)):
        query[tokens[at]] = weights[at]
        for place in range(places[tokens[at]], places[tokens[at] + 1]):
            bounds[blocks[place]] += weights[at] * most[place]
    order = descending(bounds)
    scores, rows = np.full(k, np.float32(0)), np.full(k, -1)
    for block in order:
        if bounds[block] * share <= scores[0]:
            break
        for row in range(block * size, min(len(starts) - 1, (block + 1) * size)):
            score = np.float32(0)
            for at in range(starts[row], starts[row + 1]):
                score += query[ids[at]] * held[at]
            if score > scores[0]:
                replace_least(scores, rows, score, row)
    for token in tokens:
        query[token] = 0
    return rows, scores


@kernel
def descending(bounds):
    """Blocks by their bounds, the highest first, in 1,024 steps."""
    ends, factor = np.zeros(1026, np.int32), 1023.99 / max(bounds.max(), np.float32(1e-9))
    for block in range(len(bounds)):
        ends[1024 - int(bounds[block] * factor)] += 1
    ends, order = np.cumsum(ends), np.empty(len(bounds), np.int32)
    for block in range(len(bounds) - 1, -1, -1):
        step = 1024 - int(bounds[block] * factor)
        ends[step] -= 1
        order[ends[step]] = block
    return order


@kernel
def replace_least(scores, rows, score, row):
    """Put a row into the heap of the best, in place of the worst of them."""
    place = 0
    while 2 * place + 1 < len(scores):
        child = 2 * place + 1
        if child + 1 < len(scores) and scores[child + 1] < scores[child]:
            child += 1
        if scores[child] >= score:
            break
        scores[place], rows[place] = scores[child], rows[child]
        place = child
    scores[place], rows[place] = score, row
