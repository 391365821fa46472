"""The passages of a live index, as what they are to a program: looked up, listed, counted, changed by a filter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, overload

import numpy as np

from ultrarag.errors import UsageError
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import held_vectors
from ultrarag.retrieve.passages import count_matching, delete_matching, list_passages, update_matching
from ultrarag.retrieve.ranking import check_ids
from ultrarag.retrieve.search import Filter, matches, parse
from ultrarag.types import Embeddings, Passage


class Collection:
    """What `LiveIndex` offers of its passages beside adding and searching them.

    Filters are those of a search (`ultrarag.retrieve.search.filters`). The metadata of all passages is read for one
    that is listed, counted or changed by.
    """

    @property
    def _core(self) -> Core:
        raise NotImplementedError

    def get(self, id: str) -> Passage | None:
        """Return a passage, or None."""
        _ = self._core.live
        return self._core.store.get([id]).get(id)

    def get_many(self, ids: Iterable[str]) -> dict[str, Passage]:
        """Return the passages of these ids, in their order; ids that do not exist are left out."""
        _ = self._core.live
        wanted = _ids(ids)
        found = self._core.store.get(wanted)
        return {id: found[id] for id in wanted if id in found}

    def existing(self, ids: Iterable[str]) -> set[str]:
        """Return those of the ids that are passages here."""
        _ = self._core.live
        return self._core.store.existing(_ids(ids))

    @overload
    def vectors(self, ids: Sequence[str], missing: Literal["fail"] = "fail") -> Embeddings: ...

    @overload
    def vectors(self, ids: Sequence[str], missing: Literal["skip"]) -> tuple[list[str], Embeddings]: ...

    def vectors(
        self, ids: Sequence[str], missing: Literal["fail", "skip"] = "fail"
    ) -> Embeddings | tuple[list[str], Embeddings]:
        """What the live generation stores for these passages, a row each.

        Args:
            missing: what becomes of ids without vectors (deleted meanwhile, or of a text that cannot be encoded):
                "fail" raises UsageError, which names one; "skip" leaves them out, and returns the ids of the rows as
                well: (ids, vectors), both empty where none has vectors.
        """
        if missing not in ("fail", "skip"):
            raise UsageError(f"missing is {missing!r}; it must be 'fail' or 'skip'")
        backend = self._core.live.backend
        wanted = _ids(ids)
        if missing == "fail":
            return backend.vectors(wanted)
        known = self._core.store.existing(wanted)
        return held_vectors(backend, [id for id in wanted if id in known])

    def passages(
        self,
        filter: Filter = None,
        *,
        ids: Iterable[str] | None = None,
        after: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Passage]:
        """Iterate over passages; writes may go on.

        They come in the order in which they were first added; with `after` or `limit`, in the order of their ids (by
        code points), which is the same in every process of a shared index, whatever is written meanwhile: the last id
        of a page is where the next one goes on.

        Args:
            filter: a condition on the metadata; default: all passages.
            ids: only these, in this order (of a page: in that of the ids); ids that do not exist are left out.
            after: an id, whether it exists or not: only those behind it. "" begins at the first.
            limit: at most so many.

        Raises:
            UsageError: for a filter or a limit that cannot be used.

        Example:
            >>> page = list(live.passages({"lang": "en"}, limit=100))
            >>> while page:
            ...     page = list(live.passages({"lang": "en"}, after=page[-1].id, limit=100))
        """
        _ = self._core.live
        node = parse(filter)
        if limit is not None and (not isinstance(limit, int | np.integer) or isinstance(limit, bool) or limit < 1):
            raise UsageError(f"limit is {limit!r}; it must be a positive integer")
        if after is not None and not isinstance(after, str):
            raise UsageError(f"after is {after!r}; it must be the id of a passage, or '' for the first page")
        start = "" if after is None and limit is not None else after
        if ids is None:
            return islice(list_passages(self._core.store, node, start), limit)
        wanted = list(dict.fromkeys(_ids(ids)))
        if start is not None:
            wanted = sorted(id for id in wanted if id > start)
        found = (p for p in self.get_many(wanted).values() if matches(node, p.metadata))
        return islice(found, limit)

    def count(self, filter: Filter = None) -> int:
        """The number of passages that pass a filter, at one moment; default: of all."""
        _ = self._core.live
        return count_matching(self._core.store, parse(filter))

    def delete(self, ids: Iterable[str] | None = None, *, filter: Filter = None) -> int:
        """Delete passages by their ids, or those that pass a filter, all at once; return how many there were.

        Ids that do not exist are ignored.

        Raises:
            UsageError: for neither or both, and for an empty filter, which would delete everything: `clear` does.
        """
        if (ids is None) == (filter is None):
            raise UsageError("delete takes either ids or a filter; `clear` deletes all passages")
        if ids is not None:
            wanted = _ids(ids)
            return self._core.write(lambda: self._core.store.delete(wanted))
        if (node := parse(filter)) is None:
            raise UsageError("delete: an empty filter means all passages; `clear` deletes them")
        return self._core.write(lambda: delete_matching(self._core.store, node))

    def clear(self) -> int:
        """Delete all passages at once; return how many there were. Generations and encoders stay."""
        return self._core.write(lambda: delete_matching(self._core.store, None))

    def update(self, filter: Filter, metadata: Mapping[str, Any]) -> int:
        """Merge metadata into that of the passages that pass a filter, all at once; return how many passed.

        No text is encoded again, in no generation: ready ones and those being built get it too.

        Args:
            filter: None or {} for all passages.
            metadata: its keys are replaced whole, also where both values are objects; None removes a key. Others stay.

        Raises:
            UsageError: for a filter that cannot be used.
            DataError: for metadata that is not JSON; nothing has changed then.
        """
        node = parse(filter)
        return self._core.write(lambda: update_matching(self._core.store, node, metadata))


def _ids(ids: Iterable[str]) -> list[str]:
    """A list of ids; one alone is taken for one id, not for its letters."""
    wanted = [ids] if isinstance(ids, str) else list(ids)
    check_ids(wanted)
    return wanted
