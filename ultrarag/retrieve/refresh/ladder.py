"""The ladder of a refresh: from what learns in seconds and encodes nothing to a full fine-tune, and how far to climb.

A rung is a way to train. The cheaper ones leave the passages' vectors as they are, or map them by a matrix, so that a
rung is judged from stored vectors alone: only the held-out queries are encoded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ultrarag.errors import TrainingError, UsageError, did_you_mean
from ultrarag.evaluation import (
    DEFAULT_METRICS,
    Evaluation,
    Significance,
    deepest,
    evaluate_run,
    significance,
    top_k_of_blocks,
)
from ultrarag.maps import apply_chain
from ultrarag.retrieve.ranking import ranked
from ultrarag.retrieve.refresh.judging import Questions

if TYPE_CHECKING:
    from ultrarag.encode import CorpusVectors
    from ultrarag.encoder import Encoder
    from ultrarag.maps import LinearMap

logger = logging.getLogger("ultrarag")

AUTO, FULL = "auto", "full"
#: The ways to train, the cheapest first, with the arguments of `finetune` that make them.
RUNGS: dict[str, dict[str, Any]] = {
    "query-map": {"train_side": "query", "query_map": "linear"},
    "query": {"train_side": "query"},
    "passage-map": {"train_side": "query", "passage_map": "linear"},
    FULL: {},
}
#: What `refresh` takes.
EFFORTS = (AUTO, *RUNGS)

#: Steps of a pilot; and passages that a pilot of a full fine-tune may encode, so many for a query.
PILOT_STEPS, PILOT_PASSAGES, PILOT_CANDIDATES = 100, 4000, 30
#: Judged queries without which no rung can be told from chance.
FEWEST = 20


def checked_effort(effort: str) -> str:
    """The effort.

    Raises:
        UsageError: it is none of `EFFORTS`.
    """
    if effort not in EFFORTS:
        raise UsageError(f"unknown effort '{effort}'{did_you_mean(effort, EFFORTS)}; one of {', '.join(EFFORTS)}")
    return effort


def of_effort(rung: str, message: str) -> str:
    """What a fine-tune refuses, in terms of what a refresh is given: the flags that make a rung are its effort."""
    flags = [f"--{name} {value}" for name, value in RUNGS[rung].items()]
    for flag in flags:
        message = message.replace(flag, f"the rung '{rung}'")
    return message.replace("leave one of them out", "leave it out, or give another effort")


#: Gives the contents of passages by their ids.
Texts = Callable[[Sequence[str]], Mapping[str, str]]


@dataclass
class Comparison:
    """One system against another on the same queries."""

    metric: str
    old: float
    new: float
    #: see `ultrarag.evaluation.Significance`
    change: dict[str, Any]

    @classmethod
    def of(cls, metric: str, before: Mapping[str, float], after: Mapping[str, float]) -> Comparison:
        """Compare the values of the queries that both have, query id -> value."""
        both = [query_id for query_id in before if query_id in after]
        old, new = ({query_id: side[query_id] for query_id in both} for side in (before, after))
        before_mean, after_mean = (sum(side.values()) / len(both) for side in (old, new))
        return cls(metric, before_mean, after_mean, asdict(significance(old, new)))

    @property
    def significance(self) -> Significance:
        """The change as it was measured."""
        return Significance(**self.change)

    @property
    def better(self) -> bool:
        """Significantly better."""
        return self.significance.significant and self.significance.difference > 0

    def __str__(self) -> str:
        return f"{self.metric} {self.old:.4f} -> {self.new:.4f}: {self.significance}"


@dataclass
class Step:
    """One rung as it was tried."""

    rung: str
    #: what `finetune` gave: fingerprint, steps, loss, metrics, notes
    trained: dict[str, Any]
    #: against the live model, on the held-out queries; None for a full fine-tune, which the gate of the swap judges
    gain: Comparison | None
    #: against the live model, on the guard; None without guard data
    guard: Comparison | None
    #: the guard fell by no more than `max_forgetting`
    guard_holds: bool
    #: seconds of training and judging
    seconds: float
    #: passages that were encoded to train and judge it
    encoded: int
    #: held-out query -> value of the metric
    values: dict[str, float] = field(default_factory=dict)
    #: the next rung's pilot against this rung
    promise: Comparison | None = None
    taken: bool = False
    #: why it was taken, or passed over
    decision: str = ""

    @property
    def accepted(self) -> bool:
        """It gains significantly, and the guard holds."""
        return self.gain is not None and self.gain.better and self.guard_holds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Step:
        """Read what `to_dict` gave."""
        parts = {
            name: None if values[name] is None else Comparison(**values[name]) for name in ("gain", "guard", "promise")
        }
        return cls(**{**values, **parts})


class Judge:
    """Measures encoders on judged queries, by an exact search of the dense vectors of one corpus."""

    def __init__(self, asked: Questions, corpus: CorpusVectors, parent: Encoder, metric: str, ignore: bool) -> None:
        """Measure the parent, whose passage side made the corpus' vectors."""
        self._asked, self._corpus, self.metric, self._ignore = asked, corpus, metric, ignore
        self._ids = [query_id for query_id in asked.qrels if query_id in asked.queries]
        self._metrics = list(dict.fromkeys((metric, *DEFAULT_METRICS)))
        self._known = len(parent.passage_maps)
        self._fingerprint = parent.passage_fingerprint
        self.before = self.measure(parent).of(metric)

    def measure(self, encoder: Encoder) -> Evaluation:
        """Measure an encoder whose passage vectors are the corpus', maybe with further linear maps."""
        best = self._search(self._queries(encoder, self._ids), self.maps(encoder), self._depth)
        return self._evaluation(self._ids, best)

    def maps(self, encoder: Encoder) -> list[LinearMap]:
        """The maps that an encoder has behind its passages' vectors, and the parent has not."""
        return [item for item in encoder.passage_maps[self._known :] if item.head == "dense"]

    def promised(self, encoder: Encoder, passages: Texts) -> tuple[Evaluation, int]:
        """Measure an encoder with another passage side: the old vectors give candidates, which it encodes.

        As many of the queries are measured as `PILOT_PASSAGES` allow.

        Args:
            passages: gives the contents of passages by their ids.

        Returns:
            (what was measured, how many passages were encoded)
        """
        order = np.random.default_rng(0).permutation(len(self._ids))
        queries = self._queries(encoder, [self._ids[place] for place in order])
        found = self._search(queries, (), PILOT_CANDIDATES)
        texts = passages(sorted({id for hits in found for id, _ in hits}))
        found = [[hit for hit in hits if hit[0] in texts] for hits in found]  # some may have been deleted since
        needed: dict[str, int] = {}
        taken = 0
        for hits in found:
            new = [id for id, _ in hits if id not in needed]
            if taken and len(needed) + len(new) > PILOT_PASSAGES:
                break
            needed.update({id: place for place, id in enumerate(new, len(needed))})
            taken += 1
        vectors = encoder.encode([texts[id] for id in needed], "passage", heads=("dense",), progress=False).dense
        rescored = []
        for row in range(taken):
            ids = [id for id, _ in found[row]]
            scores = vectors[[needed[id] for id in ids]] @ queries[row]
            rescored.append(ranked(ids, scores, len(ids)))
        return self._evaluation([self._ids[place] for place in order[:taken]], rescored), len(needed)

    @property
    def _depth(self) -> int:
        return deepest(self._metrics) + self._ignore

    def _queries(self, encoder: Encoder, ids: Sequence[str]) -> np.ndarray:
        texts = [self._asked.queries[query_id] for query_id in ids]
        return np.asarray(encoder.encode(texts, "query", heads=("dense",), progress=False).dense)

    def _search(self, queries: np.ndarray, maps: Sequence[Any], k: int) -> list[list[tuple[str, float]]]:
        """The k best passages of each query, by an exact search, block by block."""
        blocks = ((first, apply_chain(maps, block.dense)) for first, block in self._corpus.blocks(("dense",)))
        scores, rows = top_k_of_blocks(queries, blocks, k)
        ids = self._corpus.ids
        return [ranked([ids[row] for row in of], found, k) for of, found in zip(rows, scores, strict=True)]

    def _evaluation(self, ids: Sequence[str], found: Sequence[Sequence[tuple[str, float]]]) -> Evaluation:
        run = {query_id: dict(hits) for query_id, hits in zip(ids, found, strict=True)}
        qrels = {query_id: self._asked.qrels[query_id] for query_id in ids}
        return evaluate_run(qrels, run, self._metrics, ignore_identical_ids=self._ignore)


class Climber(Protocol):
    """What a climb needs of a refresh."""

    def train(self, rung: str, folder: Path, steps: int | None) -> dict[str, Any]:
        """Fine-tune by a rung into a folder, for so many steps at most; returns what came of it."""

    def load(self, folder: Path) -> Encoder:
        """Load a checkpoint as the live one is loaded."""

    def texts(self, ids: Sequence[str]) -> Mapping[str, str]:
        """The contents of passages of the index."""

    def save(self) -> None:
        """Keep the steps durably."""


@dataclass(frozen=True)
class Guard:
    """What must not be forgotten."""

    judge: Judge
    #: by how much the metric may fall
    max_forgetting: float

    def compare(self, encoder: Encoder) -> Comparison:
        """Measure an encoder against the live one."""
        judge = self.judge
        return Comparison.of(judge.metric, judge.before, judge.measure(encoder).of(judge.metric))

    def holds(self, found: Comparison | None) -> bool:
        """Whether little enough was forgotten."""
        return found is None or found.significance.difference >= -self.max_forgetting - 1e-9


def climb(work: Climber, steps: list[Step], folder: Path, judge: Judge, guard: Guard | None) -> Step:
    """Climb from rung to rung; the steps that are there are not made again. Returns the one that was taken.

    A rung is taken when it gains significantly on the held-out queries, the guard holds, and the pilot of the next one
    is not significantly better. A full fine-tune is trained when no rung before it is taken: the gate of the swap
    judges it.
    """
    names = list(RUNGS)
    for place, name in enumerate(names):
        done = next((step for step in steps if step.rung == name), None)
        if done is None:
            done = _try(work, name, folder / name, judge, guard)
            steps.append(done)
            work.save()
        if not done.decision:
            _decide(work, done, steps, names[place + 1 :], folder, judge)
            work.save()
            logger.info("effort auto: %s: %s", name, done.decision)
        _fall_back(done, steps)
        if done.taken:
            return done
        if (fallen_back := next((step for step in steps if step.taken), None)) is not None:
            return fallen_back
    raise AssertionError("a full fine-tune is always taken")


def _try(work: Climber, name: str, folder: Path, judge: Judge, guard: Guard | None) -> Step:
    started = time.monotonic()
    try:
        trained = work.train(name, folder, None)
    except (TrainingError, UsageError) as error:  # such as a map that gains nothing on held-out documents
        if name == FULL:
            raise
        seconds = time.monotonic() - started
        return Step(name, {}, None, None, True, seconds, 0, decision=f"passed over: it cannot be trained: {error}")
    if name == FULL:
        return Step(name, trained, None, None, True, time.monotonic() - started, 0)
    encoder = work.load(folder)
    after = judge.measure(encoder).of(judge.metric)
    gain = Comparison.of(judge.metric, judge.before, after)
    held = None if guard is None else guard.compare(encoder)
    holds = guard is None or guard.holds(held)
    return Step(name, trained, gain, held, holds, time.monotonic() - started, 0, after)


def _decide(work: Climber, step: Step, steps: Sequence[Step], above: Sequence[str], folder: Path, judge: Judge) -> None:
    """Say whether a step is taken, and why; an earlier one is taken when this one turns out to be no better."""
    if step.rung == FULL:
        step.taken, step.decision = True, "taken: no cheaper rung was enough, and the gate of the swap judges it"
        return
    assert step.gain is not None
    earlier = [one for one in steps if one is not step and one.accepted]
    if not step.accepted:
        why = f"the guard falls, {step.guard}" if not step.guard_holds else f"no significant gain, {step.gain}"
        step.decision = f"passed over: {why}"
    elif earlier and not Comparison.of(judge.metric, earlier[-1].values, step.values).better:
        step.decision = f"passed over: not significantly better than {earlier[-1].rung}, which is cheaper"
    else:
        try:
            step.promise = _pilot(work, step, above[0], folder, judge)
        except (TrainingError, UsageError) as error:
            step.taken = True
            step.decision = f"taken: {step.gain}; {above[0]} cannot be trained: {error}"
            return
        if not step.promise.better:
            step.taken = True
            step.decision = f"taken: {step.gain}; a pilot of {above[0]} promises no more: {step.promise}"
        else:
            step.decision = f"passed over: a pilot of {above[0]} promises more: {step.promise}"
        return


def _fall_back(step: Step, steps: Sequence[Step]) -> None:
    """Take the rung below, which is good enough, where this one was climbed to by a promise that it does not keep."""
    earlier = [one for one in steps if one is not step and one.accepted]
    if earlier and not step.taken and step.promise is None and not any(one.taken for one in steps):
        earlier[-1].taken = True
        earlier[-1].decision += f"; taken all the same: {step.rung} did not keep the promise"


def _pilot(work: Climber, step: Step, name: str, folder: Path, judge: Judge) -> Comparison:
    """Train the next rung for a few steps and compare it with this one."""
    started = time.monotonic()
    pilot = folder / f"{name}-pilot"
    work.train(name, pilot, PILOT_STEPS)
    encoder = work.load(pilot)
    if name == FULL:
        found, encoded = judge.promised(encoder, work.texts)
        step.encoded += encoded
    else:
        found = judge.measure(encoder)
    step.seconds += time.monotonic() - started
    return Comparison.of(judge.metric, step.values, found.of(judge.metric))
