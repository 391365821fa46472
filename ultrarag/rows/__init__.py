"""Training rows: from files to checked rows, every fault named with file and line.

Paths or rows in memory come in; checked rows, their keys and a count of what was left out go out. Nothing here knows
what they are used for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.rows.cache import ArrowRows, CheckedRows, cached_rows, write_rows
    from ultrarag.rows.files import NO_IN_BATCH_NEG, BadJson, DataFile, find_files, raw_rows
    from ultrarag.rows.reader import (
        IN_MEMORY,
        Counts,
        Dataset,
        Paths,
        RowReader,
        as_json,
        checked_object,
        checked_row,
        file_paths,
        in_memory,
        read_eval_rows,
        read_rows,
        reading,
        rows_given,
    )
    from ultrarag.rows.row import BadRow, Row, parse_row, row_key, text_key
else:
    __getattr__, __dir__, __all__ = exports(__name__)
