"""Refresh: fine-tune, build, gate and swap, in one call that a crash only interrupts.

Rows of training data come in; a generation that is live, or refused with the numbers, and a report go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.refresh.ladder import EFFORTS
    from ultrarag.retrieve.refresh.plan import RefreshTerms
    from ultrarag.retrieve.refresh.progress import OnProgress, Refreshing
    from ultrarag.retrieve.refresh.report import RefreshReport, is_begun
    from ultrarag.retrieve.refresh.stages import refresh
    from ultrarag.retrieve.refresh.trial import Trial, check_refresh
else:
    __getattr__, __dir__, __all__ = exports(__name__)
