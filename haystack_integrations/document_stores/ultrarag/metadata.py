"""What a store says of the fields of its documents' metadata; all of them are read for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from haystack_integrations.document_stores.ultrarag.converters import RESERVED
from haystack_integrations.document_stores.ultrarag.filters import translate

if TYPE_CHECKING:
    from ultrarag.retrieve import LiveIndex

#: What `get_metadata_fields_info` calls the types of values; every other one is a keyword.
TYPES = {"bool": "boolean", "int": "int", "float": "float"}


class MetadataFields:
    """Fields are named with or without the prefix "meta."; values that are None or missing do not count."""

    if TYPE_CHECKING:

        @property
        def live(self) -> LiveIndex: ...

    def get_metadata_fields_info(self) -> dict[str, dict[str, str]]:
        """
        Returns each field with its type: keyword, int, float or boolean; of values of several types, the first one's.
        """
        found: dict[str, dict[str, str]] = {}
        for meta in self._metas(None):
            for key, value in meta.items():
                if value is not None and key != RESERVED:
                    found.setdefault(key, {"type": TYPES.get(type(value).__name__, "keyword")})
        return found

    def get_metadata_field_min_max(self, metadata_field: str) -> dict[str, Any]:
        """
        Returns the least and the greatest value of a field under "min" and "max": of its numbers, or of its strings
        where it has no numbers (ISO dates are in their order); None where it has neither.
        """
        values = list(self._values(metadata_field, None))
        numbers = [value for value in values if isinstance(value, int | float)]
        ordered: list[Any] = numbers or [value for value in values if isinstance(value, str)]
        return {"min": min(ordered), "max": max(ordered)} if ordered else {"min": None, "max": None}

    def get_metadata_field_unique_values(
        self,
        metadata_field: str,
        search_term: str | None = None,
        from_: int = 0,
        size: int = 10,
        filters: dict[str, Any] | None = None,
    ) -> tuple[list[Any], int]:
        """
        Returns the values of a field, each once and in the order of their text, and how many there are in all.

        :param search_term: Only values that contain it, whatever the case.
        :param from_: How many to pass over.
        :param size: How many at most.
        :param filters: Only of documents that pass.
        """
        term = (search_term or "").lower()
        values = [value for value in self._unique(metadata_field, filters) if term in str(value).lower()]
        values.sort(key=lambda value: (str(value), type(value).__name__))
        return values[from_ : from_ + size], len(values)

    def count_unique_metadata_by_filter(self, filters: dict[str, Any], metadata_fields: list[str]) -> dict[str, int]:
        """
        Returns how many values each of the fields has in the documents that pass a filter.
        """
        return {name.removeprefix("meta."): len(self._unique(name, filters)) for name in metadata_fields}

    def _metas(self, filters: dict[str, Any] | None) -> Iterator[Any]:
        return (passage.metadata for passage in self.live.passages(**translate(filters).options()))

    def _values(self, field: str, filters: dict[str, Any] | None) -> Iterator[Any]:
        key = field.removeprefix("meta.")
        return (meta[key] for meta in self._metas(filters) if meta.get(key) is not None)

    def _unique(self, field: str, filters: dict[str, Any] | None) -> list[Any]:
        """Values that differ as JSON, where 1, 1.0, "1" and true are four."""
        return list({json.dumps(value, sort_keys=True): value for value in self._values(field, filters)}.values())
