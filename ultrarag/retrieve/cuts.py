"""One note of how many texts were cut, where the encoder gives one for every few passages."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("ultrarag")


class _Cuts(logging.Filter):
    """Takes the encoder's notes out of the log, and adds them up: (texts or pairs, limit) -> how many."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, object]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.getMessage().endswith("tokens and were cut") or not isinstance(record.args, tuple):
            return True
        cut, _, what, length = record.args
        self.found[str(what), length] += int(str(cut))
        return False


@contextmanager
def cuts_told_once() -> Iterator[None]:
    """Within the block, keep the encoder's notes back; then say once what they add up to."""
    cuts = _Cuts()
    logger.addFilter(cuts)
    try:
        yield
    finally:
        logger.removeFilter(cuts)
        for (what, length), count in cuts.found.items():
            logger.warning("%d %s were longer than %s tokens and were cut", count, what, length)
