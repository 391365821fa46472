"""Progress on stderr: bars that appear after two seconds, and silence where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def progress_bar(total: int | None, label: str, unit: str, wanted: bool | None = None) -> Any:
    """Return a tqdm bar.

    Args:
        wanted: True always, False never, None on a terminal and after two seconds.
    """
    from tqdm import tqdm

    delay = 0 if wanted else 2
    disable = None if wanted is None else not wanted
    return tqdm(total=total, desc=label, unit=unit, delay=delay, leave=False, disable=disable, dynamic_ncols=True)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Keep transformers' own bars off a stderr that is no terminal; the process's setting is restored."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
