"""Passages: the source of truth of an index, with the ordered log of every write.

Passages of files or of Python come in, checked; records, changes and counts go out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ultrarag.lazy import exports

if TYPE_CHECKING:
    from ultrarag.retrieve.passages.database import FORMAT, Database, connect_for_reading
    from ultrarag.retrieve.passages.files import (
        STDIN,
        Layout,
        PassageFile,
        Record,
        content_hash,
        passage_file,
        read_queries,
        records,
    )
    from ultrarag.retrieve.passages.listing import count_matching, delete_matching, list_passages, update_matching
    from ultrarag.retrieve.passages.store import URI, Changes, OnExisting, Store, Written
    from ultrarag.retrieve.passages.values import jsonable
else:
    __getattr__, __dir__, __all__ = exports(__name__)
