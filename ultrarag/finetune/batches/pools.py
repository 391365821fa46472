"""Pool: rows that may stand in one batch, with the size of their batches and groups; what cannot work is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ultrarag.errors import DataError, UsageError
from ultrarag.finetune.batches.train_data import DatasetInfo, Draws, TrainData
from ultrarag.types import Example

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments

#: Types whose passages are of the queries' kind, so that they get the queries' instruction (FlagEmbedding's rule).
_PASSAGES_AS_QUERIES = ("symmetric_sts", "symmetric_clustering")


@dataclass(frozen=True)
class Pool:
    """Rows that are shuffled together and cut into batches."""

    #: (rows,) int64 row numbers
    rows: np.ndarray
    #: the datasets' names
    names: tuple[str, ...]
    #: queries per device and step
    batch_size: int
    #: passages per query, the positive included
    group_size: int
    in_batch_negatives: bool
    passages_as_queries: bool
    #: queries per device below which a query has nothing to be compared with (a loss of 0)
    fewest: int = 1

    @property
    def name(self) -> str:
        """The datasets' names in one."""
        shown = ", ".join(self.names[:3])
        return f"{shown} and {len(self.names) - 3} more" if len(self.names) > 3 else shown


@dataclass(frozen=True)
class Schedule:
    """How rows are spread over steps and ranks: the settings that are not the data's own.

    Raises:
        UsageError: a number is too small.
    """

    #: queries per rank and step, where the rows of a dataset do not say another number
    per_device_batch_size: int
    world_size: int = 1
    #: of all random choices
    seed: int = 42
    #: leave out the last rows of an epoch that do not fill a step
    drop_last: bool = False
    #: rows of similar length share a step: of every 50 steps' rows, drawn at random, each step gets neighbours in
    #: length, and the steps come in random order; less padding, where padding costs
    group_by_length: bool = False
    #: passages of other ranks are negatives too
    negatives_cross_device: bool = False

    def __post_init__(self) -> None:
        for name, least in (("per_device_batch_size", 1), ("world_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {least} or more")

    @classmethod
    def of(cls, arguments: FinetuneArguments) -> Schedule:
        """What the run's flags say."""
        training = arguments.training
        return cls(
            training.per_device_train_batch_size,
            training.world_size,
            training.seed if training.data_seed is None else training.data_seed,
            training.dataloader_drop_last,
            training.train_sampling_strategy == "group_by_length",
            arguments.loss.negatives_cross_device,
        )


def make_pools(data: TrainData, schedule: Schedule) -> list[Pool]:
    """Return one pool per dataset, or one per kind of batch where datasets may be mixed.

    Raises:
        DataError, UsageError: batches in which a query has no second candidate, or needs one without a teacher's score.
    """
    pools = [_pool(data, dataset, schedule.per_device_batch_size) for dataset in data.datasets]
    if not data.settings.same_dataset_within_batch:
        pools = _mixed(pools)
    pools = [_checked(pool, schedule) for pool in pools]
    if data.settings.knowledge_distillation:
        _check_teacher(data, pools)
    return pools


def _pool(data: TrainData, dataset: DatasetInfo, batch_size: int) -> Pool:
    same_dataset, asked = data.settings.same_dataset_within_batch, data.settings.train_group_size
    most = int(data.negatives[dataset.start : dataset.stop].max())
    return Pool(
        rows=np.arange(dataset.start, dataset.stop),
        names=(dataset.name,),
        batch_size=_batch_size(dataset, batch_size) if same_dataset else batch_size,
        group_size=_group_size(dataset, asked, most),
        in_batch_negatives=dataset.in_batch_negatives,
        passages_as_queries=dataset.type in _PASSAGES_AS_QUERIES,
    )


def _batch_size(dataset: DatasetInfo, asked: int) -> int:
    if dataset.batch_size:
        return dataset.batch_size
    # half as many, as FlagEmbedding does, but never so few that a query has no other to be compared with
    return max(asked // 2, min(asked, 2)) if dataset.type.startswith("symmetric") else asked


def _group_size(dataset: DatasetInfo, asked: int, most_negatives: int) -> int:
    """Passages per query: 1 where no row has a negative, else what the type, the rows or the run say."""
    if most_negatives == 0:
        return 1
    asked = dataset.train_group_size or asked
    if dataset.type == "only_1neg":
        return 2
    # a classification row lists all other classes: to repeat them teaches nothing
    return min(most_negatives + 1, asked) if dataset.type == "symmetric_class" else asked


def _mixed(pools: Sequence[Pool]) -> list[Pool]:
    """Put pools together whose batches are of one kind."""
    kinds: dict[tuple[object, ...], list[Pool]] = {}
    for pool in pools:
        kind = (pool.in_batch_negatives, pool.group_size, pool.passages_as_queries)
        kinds.setdefault(kind, []).append(pool)
    return [
        replace(
            group[0],
            rows=np.concatenate([pool.rows for pool in group]),
            names=tuple(name for pool in group for name in pool.names),
        )
        for group in kinds.values()
    ]


def _checked(pool: Pool, schedule: Schedule) -> Pool:
    """Return the pool with `fewest` set, after checking that its batches can teach anything."""
    if pool.group_size > 1:
        return pool
    if not pool.in_batch_negatives:
        raise DataError(
            f"'{pool.name}': no query would have a negative, neither in its row nor from its batch, and the loss "
            "would be 0; give rows 'neg' (and --train_group_size 2 or more), or allow negatives from the batch"
        )
    if len(pool.rows) == 1:
        raise DataError(f"'{pool.name}' has a single row and no negatives: there is nothing to learn; give it 'neg'")
    compared = schedule.world_size if schedule.negatives_cross_device else 1
    fewest = 1 if compared > 1 else 2
    if pool.batch_size < fewest:
        raise UsageError(
            f"'{pool.name}': a batch of one query with one passage has nothing to compare, and the loss would be 0; "
            "raise --per_device_train_batch_size, or --train_group_size with 'neg' in the rows"
            + ("" if schedule.world_size == 1 else ", or add --negatives_cross_device")
        )
    return replace(pool, fewest=fewest)


def remarks(data: TrainData, pools: Sequence[Pool]) -> Iterator[str]:
    """Yield what a user should know: batch sizes without effect, groups of one, too few negatives."""
    asked = data.settings.train_group_size
    unused = [dataset.name for dataset in data.datasets if dataset.batch_size]
    if unused and not data.settings.same_dataset_within_batch:
        yield f"'batch_size' in the rows of {', '.join(unused)} has an effect only with same_dataset_within_batch"
    for pool in pools:
        counts = data.negatives[pool.rows]
        if pool.group_size == 1:
            if asked > 1:
                yield (
                    f"'{pool.name}': no row has negatives, so its queries are compared with the other passages of "
                    f"their batch only (group size 1, not {asked})"
                )
            continue
        without, few = int((counts == 0).sum()), int(((counts > 0) & (counts < pool.group_size - 1)).sum())
        if without:
            yield f"'{pool.name}': {without} rows without negatives get passages of other rows of their dataset"
        if few:
            yield f"'{pool.name}': {few} rows have fewer than {pool.group_size - 1} negatives, which are repeated"


def check_groups(pools: Sequence[Pool]) -> None:
    """Refuse data in which a query has no negative: a cross-encoder's loss of a group of one is 0.

    Raises:
        DataError: names a dataset.
    """
    single = [pool.name for pool in pools if pool.group_size == 1]
    if single:
        raise DataError(
            f"'{single[0]}': a cross-encoder compares a query's positive with its own negatives, and there are none; "
            "give rows 'neg', and --train_group_size 2 or more"
        )


def _check_teacher(data: TrainData, pools: Sequence[Pool]) -> None:
    """Refuse rows that would need negatives without a teacher's score.

    Raises:
        DataError: names them.
    """
    for pool in pools:
        bare = pool.rows[data.negatives[pool.rows] == 0]
        if pool.group_size > 1 and len(bare):
            places = ", ".join(data[int(row)].source for row in bare[:5])
            raise DataError(
                f"{len(bare)} rows of '{pool.name}' have no 'neg', and passages of other rows have no teacher's "
                f"score for them: {places}; give them 'neg' and 'neg_scores', or leave them out"
            )


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


def draw_candidates(data: TrainData, number: int, group_size: int, draws: Draws) -> Candidates:
    """Draw a positive and group_size - 1 negatives of row `number`.

    Where there are fewer, they are drawn from as many copies of them as are needed; a row without any borrows
    passages of other rows of its dataset.

    Raises:
        DataError: there is nothing to borrow.
    """
    example, teacher = data[number], data.settings.knowledge_distillation
    positive = draws.below(len(example.pos))
    shuffled = draws.happens(data.settings.shuffle_ratio)
    first = _shuffled(example.pos[positive], draws) if shuffled else example.pos[positive]
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
