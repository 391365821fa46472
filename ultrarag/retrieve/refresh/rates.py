"""Rates: how a query side is trained: at a rate found on a slice, for as long as held-out queries gain.

Both are judged by rows that are held out of training with their documents, against stored vectors, so that it takes
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ultrarag.evaluation import MAIN_METRIC

#: Rungs that train an encoder's query side, for which steps and rate are found.
STOPPED = ("query", "passage-map")
#: The one of them whose weights are averaged with the live ones.
AVERAGED = "query"
#: One of so many layers of a query side, the first ones, stay as they are with the embeddings.
FROZEN = 3
#: What is kept of what a query side has learned; the rest of its weights is its parent's, which holds other domains.
KEPT = 0.9
#: How long such a rung is trained, and on how many queries at a time: no passage is encoded with them.
DEFAULTS = {"num_train_epochs": 2, "per_device_train_batch_size": 64}
#: Multiples of the usual rate that are tried, the last one only where the one before is no better than the usual. Above
#: twice the usual rate other domains lose: docs/refresh.md has the figures.
FACTORS = (1.0, 2.0, 1 / 3)
#: A trial has one of so many of a run's steps; and how many at least and at most. On the virology articles 4 steps of
#: 16 choose alike with three seeds, 2 do not; on medquad 6 of 89 do.
SHARE, FEWEST_STEPS, MOST_STEPS = 6, 4, 50
#: Looks at the held-out queries in a run; and how many without a gain end it.
LOOKS, PATIENCE = 4, 2
#: The argument of `finetune` that says otherwise.
PATIENT = "early_stopping_patience"
#: Seconds from one checkpoint to the next: a run that is killed loses as much.
BETWEEN_CHECKPOINTS = 300

#: Trains at a rate for so many steps, and returns the main metric of the held-out queries after it.
Trial = Callable[[float, int], float]


def find_rate(usual: float, steps: int, trial: Trial) -> dict[str, Any]:
    """Try rates on a slice of a run's steps; of rates of equal worth the lowest is taken.

    A lower rate than the usual is not tried where a higher one is better: what a rate is worth has one peak.

    Returns:
        learning_rate, steps of the slice, and what was tried: rate -> the metric
    """
    part = min(steps, max(FEWEST_STEPS, min(MOST_STEPS, steps // SHARE)))
    usual, higher, lower = (usual * factor for factor in FACTORS)
    tried = {rate: trial(rate, part) for rate in (usual, higher)}
    if tried[higher] <= tried[usual]:
        tried[lower] = trial(lower, part)
    best = max(sorted(tried), key=lambda rate: tried[rate])
    return {"learning_rate": best, "steps": part, "tried": {named(rate): tried[rate] for rate in tried}}


def named(rate: float) -> str:
    """A rate as the report names it."""
    return f"{rate:.3g}"


def described(found: Mapping[str, Any]) -> str:
    """What was found, in words."""
    tried = ", ".join(f"{rate}: {value:.4f}" for rate, value in found["tried"].items())
    return (
        f"learning rate {found['learning_rate']:.3g}, the best of {found['steps']} steps each ({MAIN_METRIC} {tried})"
    )


def stopping(given: Mapping[str, Any], steps: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a run that looks at its held-out queries, keeps the best checkpoint, and may end early.

    Args:
        asked: when to look, by finetune's names, where the caller says so: eval_strategy, eval_steps.
    """
    if is_on(given.get("save_on_epoch_end")):
        return {PATIENT: PATIENCE, **given, "eval_strategy": "epoch"}
    if "epoch" in (given.get("save_strategy"), asked.get("eval_strategy")):
        return {PATIENT: PATIENCE, **given, "save_strategy": "epoch", "eval_strategy": "epoch"}
    every = asked.get("eval_steps") or max(1, math.ceil(steps / LOOKS))
    looks = {"eval_steps": every, "save_steps": every, "save_min_seconds": BETWEEN_CHECKPOINTS}
    looks = {} if "save_steps" in given and "eval_steps" not in asked else looks
    return {PATIENT: PATIENCE, **looks, **given, "eval_strategy": "steps"}


def is_on(value: Any) -> bool:
    """Whether a switch that may be given, also as a word of the command line, is on."""
    return value is not None and str(value).lower() not in ("false", "0", "no", "n", "off")
