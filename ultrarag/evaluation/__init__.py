"""Judgement: ranking metrics, significance, and what was measured of one system or of two.

Runs and judgements (qrels) come in, from memory, BEIR folders or TREC files; metrics and verdicts go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.evaluation.formats import (
        Collection,
        judgements,
        parse_passage,
        parse_query,
        qrels_file,
        read_beir,
        read_run,
        write_beir,
        write_run,
    )
    from ultrarag.evaluation.metrics import (
        DEFAULT_METRICS,
        MAIN_METRIC,
        Run,
        Significance,
        best_columns,
        deepest,
        ndcg_of_rows,
        run_of,
        significance,
        top_k,
        top_k_of_blocks,
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
        passages_of,
    )
else:
    __getattr__, __dir__, __all__ = exports(__name__)
