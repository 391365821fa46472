"""The loops over lexical weights, compiled by numba when they are first called, and kept in its cache.

Blocks of rows that are alike are scored from the highest bound down, until no bound can reach the hits (Mallia, Suel
and Tonellotto, "Faster Learned Sparse Retrieval with Block-Max Pruning", SIGIR 2024). In a block the rows that hold a
token lie together, so that only weights of the query's tokens are read.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache

#: A token's step at least: times the least weight of a query it is still a normal number of float32.
LEAST_STEP = np.float32(1e-20)
#: Blocks whose highest bound is kept.
GROUP = 64

logger = logging.getLogger("ultrarag")


class Cache(FunctionCache):
    """Numba's cache of a loop, without which it is compiled: no search fails for a full disk or a damaged file."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled before; None where nothing was, or it cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # of pickle: whatever damaged bytes happen to mean
            self._give_up("read", error)
        try:
            self.flush()
        except OSError as error:
            self._give_up("written", error)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, where there is room."""
        try:
            super().save_overload(sig, data)
        except (OSError, EOFError) as error:
            self._give_up("written", error)

    def _give_up(self, done: str, error: Exception) -> None:
        logger.info("numba's cache '%s' cannot be %s (%s): a loop is compiled anew", self.cache_path, done, error)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the interpreter's lock; where numba finds no folder for its cache, for this process alone."""
    compiled: Any = numba.njit(nogil=True)(function)
    if compiled is not function:  # as under NUMBA_DISABLE_JIT
        try:
            compiled._cache = Cache(function)
        except RuntimeError:
            logger.info("numba finds no folder for its cache: each process compiles '%s'", function.__name__)
    return compiled


@kernel
def leading(starts, tokens, weights, rarity, count):
    """The tokens of the largest weights of each row, times the rarity of each token, (rows, count); -1 beyond."""
    found = np.full((len(starts) - 1, count), -1, np.int32)
    best = np.zeros(count, np.float32)
    for row in range(len(starts) - 1):
        best[:] = 0
        for at in range(starts[row], starts[row + 1]):
            weight, place = weights[at] * rarity[tokens[at]], count - 1
            if weight <= best[place]:
                continue
            while place > 0 and best[place - 1] < weight:
                best[place], found[row, place] = best[place - 1], found[row, place - 1]
                place -= 1
            best[place], found[row, place] = weight, tokens[at]
    return found


@kernel
def gathered(starts, tokens, impacts, order, size, vocabulary):
    """Blocks of `size` rows: of each block the tokens that its rows hold, and of each token the rows and impacts.

    Returns:
        begins, heads: (blocks + 1,) int64, where the tokens of a block begin, and its postings
        held: (entries,) uint32, a block's tokens
        lengths, most: (entries,) uint8, of a token in a block its rows, and the largest impact
        postings: (weights,) uint16: a row's place in its block, eight bits, and its impact, eight bits
    """
    blocks = (len(order) + size - 1) // size
    begins, heads = np.zeros(blocks + 1, np.int64), np.zeros(blocks + 1, np.int64)
    held, lengths = np.empty(len(tokens), np.uint32), np.empty(len(tokens), np.uint8)
    most, postings = np.empty(len(tokens), np.uint8), np.empty(len(tokens), np.uint16)
    entry_of, free = np.full(vocabulary, -1, np.int64), np.empty(vocabulary, np.int64)
    entry, place = 0, 0
    for block in range(blocks):
        begins[block], heads[block], first = entry, place, entry
        rows = order[block * size : (block + 1) * size]
        for row in rows:
            for at in range(starts[row], starts[row + 1]):
                token = tokens[at]
                if entry_of[token] < first:
                    entry_of[token] = entry
                    held[entry], lengths[entry], most[entry] = token, 0, 0
                    entry += 1
                lengths[entry_of[token]] += 1
                most[entry_of[token]] = max(most[entry_of[token]], impacts[at])
        for at in range(first, entry):
            free[at - first] = place
            place += int(lengths[at])
        for number in range(len(rows)):
            for at in range(starts[rows[number]], starts[rows[number] + 1]):
                to = entry_of[tokens[at]] - first
                postings[free[to]] = number << 8 | int(impacts[at])
                free[to] += 1
    begins[blocks], heads[blocks] = entry, place
    return begins, heads, held[:entry].copy(), lengths[:entry].copy(), most[:entry], postings


@kernel
def maxima(begins, held, most, vocabulary, share):
    """Of each token its largest impact in each block.

    Returns:
        places: (vocabulary + 1,) int64, where the blocks of a token begin
        blocks, highest: (entries,) uint32 and uint8, the blocks that hold it, ascending
        lines: (vocabulary,) int32: for a token in more than `share` of the blocks its line, -1 for others
        table: (lines, blocks) uint8
    """
    count = len(begins) - 1
    places, lines = np.zeros(vocabulary + 1, np.int64), np.full(vocabulary, -1, np.int32)
    for at in range(len(held)):
        places[held[at] + 1] += 1
    line = 0
    for token in range(vocabulary):
        if places[token + 1] > share * count:
            lines[token] = line
            places[token + 1] = 0
            line += 1
    places = np.cumsum(places)
    free = places.copy()
    blocks, highest = np.empty(places[-1], np.uint32), np.empty(places[-1], np.uint8)
    table = np.zeros((line, count), np.uint8)
    for block in range(count):
        for at in range(begins[block], begins[block + 1]):
            token = held[at]
            if lines[token] >= 0:
                table[lines[token], block] = most[at]
            else:
                blocks[free[token]], highest[free[token]] = block, most[at]
                free[token] += 1
    return places, blocks, highest, lines, table


@kernel
def bounded(tokens, weights, places, blocks, highest, lines, table, bounds):
    """What a row of each block can score at most, into `bounds`."""
    bounds[:] = 0
    for at in range(len(tokens)):
        token, weight = tokens[at], weights[at]
        if lines[token] >= 0:
            line = table[lines[token]]
            for block in range(len(bounds)):
                bounds[block] += weight * np.float32(line[block])
        else:
            for place in range(places[token], places[token + 1]):
                bounds[np.uint32(blocks[place])] += weight * np.float32(highest[place])


@kernel
def promising(
    tokens, weights, begins, heads, held, lengths, postings, rows, size, passing, k, floor, share, slack, bounds, query
):
    """The rows whose scores may be among the k best.

    Scores by impacts are at least the true ones, which are at least `share` of them less `slack`. `bounds` are used up;
    `query` is zeros, of all tokens, and is left so.
    """
    for at in range(len(tokens)):
        query[tokens[at]] = weights[at]
    highest = np.zeros((len(bounds) + GROUP - 1) // GROUP, np.float32)
    for group in range(len(highest)):
        highest[group] = bounds[group * GROUP : (group + 1) * GROUP].max()
    groups = np.argsort(-highest)
    best, sums = np.full(k, np.float32(0)), np.zeros(size, np.float32)
    kept, scores, count = np.empty(4 * k + 64, np.int32), np.empty(4 * k + 64, np.float32), 0
    least = floor
    for seeding in (True, False):  # the best block of each of the best groups gives a bar for the others
        for group in groups[: k + 6] if seeding else groups:
            if highest[group] < least or highest[group] <= 0:
                break
            for block in range(group * GROUP, min(len(bounds), (group + 1) * GROUP)):
                if bounds[block] < (highest[group] if seeding else least) or bounds[block] <= 0:
                    continue
                bounds[block] = 0
                if len(passing) and not any_passes(rows[block * size : (block + 1) * size], passing):
                    continue
                summed(block, begins, heads, held, lengths, postings, query, sums)
                for place in range(size):
                    score, sums[place] = sums[place], 0
                    if score <= 0 or score < least:
                        continue
                    row = rows[block * size + place]
                    if len(passing) and not passing[row]:
                        continue
                    if score > best[0]:
                        replace_least(best, score)
                        least = max(floor, best[0] * share - slack)
                    if count == len(kept):
                        count = compacted(kept, scores, count, least)
                        if 2 * count > len(kept):
                            kept, scores = np.concatenate((kept, kept)), np.concatenate((scores, scores))
                    kept[count], scores[count] = row, score
                    count += 1
    for token in tokens:
        query[token] = 0
    count = compacted(kept, scores, count, least)
    return kept[:count]


@kernel
def any_passes(rows, passing):
    """Whether one of the rows passes: of 16 none does in most blocks, where few rows pass."""
    found = False
    for row in rows:
        found |= passing[row]
    return found


@kernel
def summed(block, begins, heads, held, lengths, postings, query, sums):
    """Add up the scores of a block's rows by impacts, into `sums`."""
    first = heads[block]
    for entry in range(begins[block], begins[block + 1]):
        last = first + lengths[entry]
        weight = query[held[entry]]
        if weight > 0:
            for place in range(first, last):
                posting = np.uint32(postings[place])
                sums[posting >> np.uint32(8)] += weight * np.float32(posting & np.uint32(255))
        first = last


@kernel
def compacted(kept, scores, count, least):
    """Keep those whose score is enough; how many there are."""
    held = 0
    for at in range(count):
        if scores[at] >= least:
            kept[held], scores[held] = kept[at], scores[at]
            held += 1
    return held


@kernel
def replace_least(heap, score):
    """Put a score into a heap of the best, in place of the least."""
    place = 0
    while 2 * place + 1 < len(heap):
        child = 2 * place + 1
        if child + 1 < len(heap) and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= score:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = score


@kernel
def quantised(tokens, weights, vocabulary):
    """A byte for each weight, rounded up, and the step of each token: a weight is at most its byte times the step."""
    steps = np.zeros(vocabulary, np.float32)
    for at in range(len(tokens)):
        steps[tokens[at]] = max(steps[tokens[at]], weights[at])
    for token in range(vocabulary):
        steps[token] = max(steps[token] * np.float32(1.000001 / 255), LEAST_STEP)
    found = np.empty(len(tokens), np.uint8)
    for at in range(len(tokens)):
        found[at] = max(1, min(255, int(np.ceil(weights[at] / steps[tokens[at]]))))
    return found, steps


@kernel
def occurring(tokens, vocabulary):
    """Which tokens occur, (vocabulary,) bool."""
    found = np.zeros(vocabulary, np.bool_)
    for at in range(len(tokens)):
        found[tokens[at]] = True
    return found


@kernel
def numbered(tokens, numbers):
    """Each token's number."""
    found = np.empty(len(tokens), np.int32)
    for at in range(len(tokens)):
        found[at] = numbers[tokens[at]]
    return found


@kernel
def products(pairs, starts, tokens, weights):
    """Inner products of rows with a query, (rows,) float64; the same for the same weights in any row."""
    size = 4096  # so few of the passages' tokens meet one of the query's that there is no second look
    while size < 64 * len(tokens):
        size *= 2
    last = np.uint32(size - 1)
    held, places = np.zeros(size, np.uint32), np.full(size, -1, np.int32)
    for at in range(len(tokens)):
        slot = hashed(tokens[at], last)
        while places[slot] >= 0:
            slot = (slot + np.uint32(1)) & last
        held[slot], places[slot] = tokens[at], at
    scores = np.zeros(len(starts) - 1)
    for row in range(len(scores)):
        for at in range(starts[row], starts[row + 1]):
            token = pairs[at]["token"]
            slot = hashed(token, last)
            while places[slot] >= 0:
                if held[slot] == token:
                    scores[row] += np.float64(pairs[at]["weight"]) * weights[places[slot]]
                    break
                slot = (slot + np.uint32(1)) & last
    return scores


@kernel
def hashed(token, last):
    """Where a token is looked for."""
    return np.uint32(np.uint64(token) * np.uint64(2654435761) >> np.uint64(15) & np.uint64(last))
