"""Checks on rows: duplicates, conflicts, cuts, leaks of evaluation data, and the cost of a run.

Rows come in; findings and estimates go out, each with its place in the files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.rows.checks.documents import (
        EVIDENCE,
        document_of,
        named_in,
        names_in_row,
    )
    from ultrarag.rows.checks.groups import Components, DocumentGroups, hold_out
    from ultrarag.rows.checks.leaks import Judged, LeakChecks, Overlap, described
    from ultrarag.rows.checks.lengths import Cost, Lengths, Sample, estimate, measure, steps_of, token_counter
    from ultrarag.rows.checks.rows import (
        SHOWN,
        Finding,
        RowChecks,
        described_scripts,
        guessed_tokens,
        leak_key,
        nearly_same,
        shingles,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
