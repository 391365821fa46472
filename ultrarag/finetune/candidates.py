"""Candidates: the passages that one query is compared with, drawn from its row by (seed, epoch, row) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ultrarag.errors import DataError
from ultrarag.finetune.data import TrainData
from ultrarag.finetune.draws import Draws
from ultrarag.types import Example

#: Texts up to this length are never shuffled (FlagEmbedding's rule).
_SHORT = 100
#: Draws for each passage borrowed from other rows before repeats are accepted.
_TRIES = 32


@dataclass(frozen=True)
class Candidates:
    """A row's query with its positive and negatives."""

    example: Example
    #: (group,) the positive first
    passages: list[str]
    #: (group,) the teacher's scores of `passages`
    scores: list[float] | None


def draw_candidates(
    data: TrainData, number: int, group_size: int, draws: Draws, shuffle_ratio: float = 0.0, teacher: bool = False
) -> Candidates:
    """Draw a positive and group_size - 1 negatives of row `number`.

    Where there are fewer, they are drawn from as many copies of them as are needed; a row without any borrows
    passages of other rows of its dataset.

    Raises:
        DataError: there is nothing to borrow.
    """
    example = data[number]
    positive = draws.below(len(example.pos))
    first = _shuffled(example.pos[positive], draws) if draws.happens(shuffle_ratio) else example.pos[positive]
    if not example.neg:
        borrowed = _borrowed(data, number, example, group_size - 1, draws)
        return Candidates(example, [first, *borrowed], _scores(example, positive, []) if teacher else None)
    chosen = _sample(len(example.neg), group_size - 1, draws)
    scores = _scores(example, positive, chosen) if teacher else None
    return Candidates(example, [first, *(example.neg[i] for i in chosen)], scores)


def _sample(available: int, wanted: int, draws: Draws) -> list[int]:
    """Draw without repeats where there are enough; else from as many copies of all as are needed."""
    copies = max(1, math.ceil(wanted / available))
    return [int(i) % available for i in draws.order(available * copies)[:wanted]]


def _scores(example: Example, positive: int, negatives: list[int]) -> list[float]:
    assert example.pos_scores is not None  # checked when the rows were read
    return [example.pos_scores[positive], *((example.neg_scores or ())[i] for i in negatives)]


def _shuffled(text: str, draws: Draws) -> str:
    """Return a long text as its three thirds in another order."""
    if len(text) <= _SHORT:
        return text
    size = len(text) // 3 + 1
    thirds = [text[start : start + size] for start in range(0, len(text), size)]
    return " ".join(thirds[i] for i in draws.order(len(thirds)))


def _borrowed(data: TrainData, number: int, example: Example, wanted: int, draws: Draws) -> list[str]:
    """Draw negatives, else positives, of other rows: never a text that is a positive of the same query."""
    found: list[str] = []
    dataset = data.dataset_of(number)
    for _ in range(_TRIES * wanted):
        if len(found) == wanted:
            break
        other = data[dataset.start + draws.below(dataset.stop - dataset.start)]
        texts = other.neg or other.pos
        text = texts[draws.below(len(texts))]
        if other.query != example.query and text not in example.pos and text not in found:
            found.append(text)
    if wanted and not found:
        raise DataError(
            f"{example.source} has no 'neg', and '{dataset.name}' has no other passage that could be one; "
            "give it 'neg', or leave it out"
        )
    return [found[i % len(found)] for i in range(wanted)]
