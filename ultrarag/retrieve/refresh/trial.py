"""What a refresh would do, without doing it: rows, steps, judges, and what would refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrarag.errors import DataError
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.refresh.plan import Plan, RefreshTerms
from ultrarag.rows.checks import described


@dataclass(frozen=True)
class Trial:
    """The result of `LiveIndex.check_refresh`."""

    effort: str
    #: rows to train on, and the steps that a fine-tune takes, about
    rows: int
    steps: int
    #: the live generation and its encoder, which is trained further
    generation: int
    fingerprint: str
    #: what the gate asks, such as "300 queries on the index"; None: nothing
    judged_on: str | None
    #: how many of the rows the encoder, or one before it, was trained on; None: none that is known
    seen: str | None
    #: what the rows share with the gate's queries, in words; None where nothing is judged
    shared: str | None
    #: what would refuse it before the training, in the words of the error
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def check_refresh(core: Core, train_data: Any, eval_data: Any, terms: RefreshTerms, arguments: dict[str, Any]) -> Trial:
    """See `LiveIndex.check_refresh`."""
    from ultrarag.finetune import read_data

    nowhere = Path(core.layout.root) / "not-written"
    plan = Plan(core, train_data, eval_data, nowhere, terms, arguments)
    problems: list[str] = []
    seen, overlap = plan.seen(), None
    with _noted(problems):
        plan.refuse_seen()
    with _noted(problems):
        overlap = plan.look_for_leaks()
    return Trial(
        effort=plan.effort,
        rows=len(read_data(plan.settings)),
        steps=plan.steps(),
        generation=plan.parent.id,
        fingerprint=plan.parent.fingerprint,
        judged_on=None if plan.asked is None else str(plan.asked),
        seen=None if seen is None else str(seen),
        shared=None if overlap is None else described(overlap),
        problems=problems,
    )


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        problems.append(str(error))
