"""The room of judgement: ranking metrics, significance, and what was measured of one system or of two.

Runs and judgements (qrels) come in, from memory, BEIR folders or TREC files; metrics and verdicts go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.evaluation.formats import judgements, parse_passage, parse_query, qrels_file, read_run, write_run
    from ultrarag.evaluation.metrics import (
        DEFAULT_METRICS,
        Collection,
        Run,
        Significance,
        best_columns,
        read_beir,
        run_of,
        significance,
        top_k,
        write_beir,
    )
    from ultrarag.evaluation.qrels import Qrels, checked_qrels, checked_queries, coverage
    from ultrarag.evaluation.results import (
        SHOWN,
        Evaluation,
        Measured,
        Searchable,
        Verdict,
        differences,
        evaluate,
        evaluate_run,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
