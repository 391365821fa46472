"""TrainData: the checked rows of a run by number, and the datasets that they belong to."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from ultrarag.finetune.arrow_rows import ArrowRows, write_rows
from ultrarag.finetune.datasets import Choice, DatasetInfo, arrange
from ultrarag.finetune.row_cache import CheckedRows, cached_rows
from ultrarag.finetune.rows import IN_MEMORY, Dataset, RowReader, in_memory, rows_given
from ultrarag.finetune.sources import DataFile, find_files
from ultrarag.finetune.text_keys import row_key
from ultrarag.progress import progress_bar
from ultrarag.types import Example

__all__ = ["DatasetInfo", "TrainData"]


class TrainData:
    """Rows 0 .. len-1, dataset after dataset; `data[i]` reads row i from the cache.

    Attributes:
        datasets: what each range of rows is.
        digest: SHA-256 of the sources' content, whatever they are called.
        files: path -> SHA-256 of each file; rows in memory count as one.
        notes: what was left out, merged or not understood, one remark each.
        teacher: every row has a teacher's scores.
        negatives: (rows,) how many negatives each row has.
    """

    def __init__(self, checked: CheckedRows, files: Sequence[DataFile], choice: Choice, teacher: bool) -> None:
        self._rows = checked.rows
        arranged = arrange(files, checked.datasets, choice)
        #: (rows,) where each row lies in the cache
        self._places = arranged.places
        self.datasets = arranged.datasets
        self.digest = checked.digest
        self.files = checked.files or {IN_MEMORY: checked.digest}
        self.notes = [*checked.notes, *arranged.notes]
        self.teacher = teacher
        self.negatives = checked.rows.negatives()[self._places]
        self._keys: np.ndarray | None = None
        self._stops = [dataset.stop for dataset in self.datasets]

    @classmethod
    def load(
        cls,
        sources: str | os.PathLike[str] | Sequence[Any],
        *,
        cache_path: str | os.PathLike[str] | None = None,
        on_bad_rows: str = "fail",
        teacher: bool = False,
        max_example_num_per_dataset: int | None = None,
        no_in_batch_neg: Sequence[str] = (),
        same_dataset_within_batch: bool = False,
        small_threshold: int = 0,
        drop_threshold: int = 0,
        seed: int = 42,
    ) -> TrainData:
        """Read files and directories of rows (through a cache on disk), or rows in memory.

        Args:
            sources: a path, paths, or rows (dicts).
            cache_path: directory of the cache; None: the user's cache directory.
            on_bad_rows: "fail", or "drop" to leave out rows that cannot be used and count them in `notes`.
            teacher: every row must have a teacher's scores.
            max_example_num_per_dataset: use a random choice of this many rows of each file.
            no_in_batch_neg: names of files (without suffix) or directories whose queries take no negatives from
                their batch, "*" for all; those whose names end in "no_in_batch_neg" take none in any case.
            same_dataset_within_batch: apply the two thresholds, as FlagEmbedding does.
            small_threshold: a directory's files with fewer rows are merged; a file named itself is left out.
            drop_threshold: merged files with fewer rows together are left out.
            seed: of the random choice.

        Raises:
            DataError: rows or files cannot be used (names each), or none are left.
            UsageError: `no_in_batch_neg` names a dataset that is not there.
        """
        thresholds = (small_threshold, drop_threshold) if same_dataset_within_batch else (0, 0)
        choice = Choice(max_example_num_per_dataset, tuple(no_in_batch_neg), *thresholds, seed)
        paths = [sources] if isinstance(sources, str | os.PathLike) else sources
        reader = RowReader(on_bad_rows, teacher)
        if rows_given(paths):
            return cls(_in_memory(paths, reader), [DataFile(IN_MEMORY)], choice, teacher)
        files, notes = find_files(paths)
        data = cls(cached_rows(files, reader, cache_path), files, choice, teacher)
        data.notes = notes + data.notes
        return data

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], **options: Any) -> TrainData:
        """Check rows in memory; the options are those of `load`.

        Raises:
            DataError: rows cannot be used, or there are none.
        """
        return cls.load(list(rows), **options)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self._rows[int(self._places[number])]

    def lengths(self) -> np.ndarray:
        """About how long each row's texts are, (rows,) float64: bytes of the query and of its mean passage."""
        return self._rows.lengths()[self._places]

    def keys(self) -> np.ndarray:
        """A number for each row, (rows,) uint64, that is the same for the same query and positives anywhere."""
        if self._keys is None:
            found = np.empty(len(self._rows), np.uint64)
            with progress_bar(len(found), "compare rows", "row") as bar:
                for number, (query, positives) in enumerate(self._rows.texts()):
                    found[number] = row_key(query, positives)
                    bar.update()
            self._keys = found[self._places]
        return self._keys

    def dataset_of(self, number: int) -> DatasetInfo:
        """Return the dataset that row `number` belongs to."""
        return self.datasets[bisect.bisect_right(self._stops, number)]


def _in_memory(rows: Sequence[Any], reader: RowReader) -> CheckedRows:
    dataset = Dataset()
    examples = list(reader.check(IN_MEMORY, in_memory(rows), dataset))
    reader.finish()
    sink = pa.BufferOutputStream()
    write_rows(examples, sink)
    content = json.dumps([[asdict(example) for example in examples], asdict(dataset)], sort_keys=True)
    return CheckedRows(
        ArrowRows(sink.getvalue()), [dataset], reader.notes, hashlib.sha256(content.encode()).hexdigest()
    )
