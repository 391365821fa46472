"""TrainData: the checked rows of a run by number, their datasets, and draws that every machine repeats."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ultrarag.errors import DataError, UsageError, did_you_mean
from ultrarag.finetune.flags import EVERY_DATASET, DataArguments
from ultrarag.io import progress_bar
from ultrarag.rows import (
    IN_MEMORY,
    NO_IN_BATCH_NEG,
    ArrowRows,
    CheckedRows,
    DataFile,
    Dataset,
    RowReader,
    cached_rows,
    find_files,
    in_memory,
    row_key,
    rows_given,
    write_rows,
)
from ultrarag.types import Example

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments


class Draws:
    """A stream of choices for one key, such as (seed, epoch, row).

    Only numpy's bit generators promise the same stream in every later version (NEP 19), its distributions do
    not; so permutations and bounded numbers are made here from raw 64-bit words. A run resumed after an
    upgrade of numpy sees the same batches.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def order(self, count: int) -> np.ndarray:
        """Return a permutation of 0..count-1, (count,) int64."""
        return np.argsort(self._bits.random_raw(count), kind="stable")

    def below(self, limit: int) -> int:
        """Return a number from 0 to limit-1 (the bias of the remainder is below limit / 2**64)."""
        return int(self._bits.random_raw()) % limit

    def all_below(self, limit: int, count: int) -> np.ndarray:
        """Return `count` numbers from 0 to limit-1, (count,) int64."""
        return (self._bits.random_raw(count) % np.uint64(limit)).astype(np.int64)

    def happens(self, probability: float) -> bool:
        """Return True with this probability."""
        return probability > 0 and (int(self._bits.random_raw()) >> 11) * 2.0**-53 < probability


def number_of(name: str) -> int:
    """Return a number that stands for `name` in a key; Python's own `hash` differs between processes."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def read_data(arguments: FinetuneArguments, replay: bool = False) -> TrainData:
    """The rows to train on, or those of earlier runs, read as the run's flags say; the first rank reads first.

    Raises:
        DataError: rows or files cannot be used (names each), or none are left.
        UsageError: `no_in_batch_neg` names a dataset that is not there.
    """
    settings = arguments.data
    if replay:
        # names speak of train_data; a replayed file whose own name says it takes no negatives from its batch either
        named = tuple(name for name in settings.no_in_batch_neg if name == EVERY_DATASET)
        settings = replace(settings, train_data=arguments.incremental.replay_data, no_in_batch_neg=named)
    with arguments.training.main_process_first(desc="reading the training data"):
        return TrainData.read(settings, arguments.training.seed)


class TrainData:
    """Rows 0 .. len-1, dataset after dataset; `data[i]` reads row i from the cache.

    Attributes:
        settings: the flags that they were read by.
        datasets: what each range of rows is.
        digest: SHA-256 of the sources' content, whatever they are called.
        files: path -> SHA-256 of each file; rows in memory count as one.
        notes: what was left out, merged or not understood, one remark each.
        negatives: (rows,) how many negatives each row has.
    """

    def __init__(self, checked: CheckedRows, files: Sequence[DataFile], settings: DataArguments, seed: int) -> None:
        self._rows = checked.rows
        self.settings = settings
        arranged = arrange(files, checked.datasets, settings, seed)
        #: (rows,) where each row lies in the cache
        self._places = arranged.places
        self.datasets = arranged.datasets
        self.digest = checked.digest
        self.files = checked.files or {IN_MEMORY: checked.digest}
        self.notes = [*checked.notes, *arranged.notes]
        self.negatives = checked.rows.negatives()[self._places]
        self._keys: np.ndarray | None = None
        self._stops = [dataset.stop for dataset in self.datasets]

    @classmethod
    def read(cls, settings: DataArguments, seed: int = 42) -> TrainData:
        """Read files and directories of rows (through a cache on disk), or rows in memory.

        Args:
            settings: says which, and what is left out of them. A directory's files below `small_threshold` are
                merged, as FlagEmbedding does; a file named itself is left out, and so are merged files that have
                fewer rows than `drop_threshold` together.
            seed: of the choice of `max_example_num_per_dataset` rows.

        Raises:
            DataError: rows or files cannot be used (names each), or none are left.
            UsageError: `no_in_batch_neg` names a dataset that is not there.
        """
        sources: Any = settings.train_data
        reader = RowReader(settings.on_bad_rows, settings.knowledge_distillation)
        if rows_given(sources):
            return cls(_in_memory(sources, reader), [DataFile(IN_MEMORY)], settings, seed)
        files, notes = find_files(sources)
        data = cls(cached_rows(files, reader, settings.cache_path), files, settings, seed)
        data.notes = notes + data.notes
        return data

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


@dataclass(frozen=True)
class DatasetInfo:
    """Rows start .. stop-1 of the training data, which share their settings."""

    name: str
    start: int
    stop: int
    #: the other queries' passages are negatives
    in_batch_negatives: bool
    #: queries per device and step, where the rows say so
    batch_size: int | None
    #: passages per query, where the rows say so
    train_group_size: int | None
    #: normal, only_1neg, symmetric_sts, symmetric_class or symmetric_clustering
    type: str


@dataclass(frozen=True)
class Arranged:
    """The datasets, and where their rows lie among all rows of the files."""

    datasets: list[DatasetInfo]
    #: (rows,) int64
    places: np.ndarray
    notes: list[str]


@dataclass(frozen=True)
class _Part:
    """Some rows that share their settings."""

    name: str
    folder: str | None
    #: (rows,) int64
    places: np.ndarray
    in_batch_negatives: bool
    batch_size: int | None
    train_group_size: int | None
    type: str


def arrange(files: Sequence[DataFile], found: Sequence[Dataset], settings: DataArguments, seed: int) -> Arranged:
    """Make datasets of files.

    Raises:
        DataError: no row is left.
        UsageError: `settings.no_in_batch_neg` holds an unknown name.
    """
    _check_names(files, settings.no_in_batch_neg)
    notes: list[str] = []
    starts = itertools.accumulate((dataset.rows for dataset in found), initial=0)
    parts = [
        _Part(
            file.name,
            file.folder,
            start + _chosen(file, dataset.rows, settings.max_example_num_per_dataset, seed, notes),
            _in_batch_negatives(file, settings.no_in_batch_neg),
            dataset.batch_size,
            dataset.train_group_size,
            dataset.type,
        )
        for file, dataset, start in zip(files, found, starts, strict=False)
        if dataset.rows
    ]
    if settings.same_dataset_within_batch:
        parts = _merge_small(parts, settings, notes)
    if not parts:
        raise DataError("no rows are left to train on: " + "; ".join(notes))
    return Arranged(_infos(parts), np.concatenate([part.places for part in parts]), notes)


def _chosen(file: DataFile, rows: int, most: int, seed: int, notes: list[str]) -> np.ndarray:
    """The numbers of the rows of a file that are used: all of them, or a random choice of `most`."""
    if rows <= most:
        return np.arange(rows)
    notes.append(f"{most} of {rows} rows of '{file.path}' are used (max_example_num_per_dataset)")
    return np.sort(Draws(seed, number_of(os.path.basename(file.path))).order(rows)[:most])


def _infos(parts: Iterable[_Part]) -> list[DatasetInfo]:
    infos, start = [], 0
    for part in parts:
        stop = start + len(part.places)
        settings = (part.in_batch_negatives, part.batch_size, part.train_group_size, part.type)
        infos.append(DatasetInfo(part.name, start, stop, *settings))
        start = stop
    return infos


# ---- in-batch negatives


def _in_batch_negatives(file: DataFile, named: Sequence[str]) -> bool:
    if EVERY_DATASET in named or not _names(file).isdisjoint(map(_plain, named)):
        return False
    declared = [os.path.basename(file.path), *_folder_names(file)[:1]]
    # every part between dots: "web_no_in_batch_neg.v2.jsonl" says it too
    return not any(part.endswith(NO_IN_BATCH_NEG) for name in declared for part in name.split("."))


def _names(file: DataFile) -> set[str]:
    """What a user may call a dataset: its file or its directory, with or without path and suffix."""
    return {file.name, os.path.basename(file.path), file.path, *_folder_names(file)}


def _folder_names(file: DataFile) -> list[str]:
    return [Path(os.path.abspath(file.folder)).name, file.folder] if file.folder else []


def _plain(name: str) -> str:
    return os.path.normpath(name) if name else name


def _check_names(files: Sequence[DataFile], named: Sequence[str]) -> None:
    known = {name for file in files for name in _names(file)}
    for name in named:
        if name != EVERY_DATASET and _plain(name) not in known:
            datasets = ", ".join(sorted({file.name for file in files})[:20])
            raise UsageError(
                f"no_in_batch_neg names '{name}', which is no dataset{did_you_mean(name, known)}; "
                f"the datasets are: {datasets}"
            )


# ---- thresholds


def _merge_small(parts: Sequence[_Part], settings: DataArguments, notes: list[str]) -> list[_Part]:
    """Merge the small files of each directory, and leave out what is too small, as FlagEmbedding does."""
    small = [part for part in parts if len(part.places) < settings.small_threshold]
    kept = [part for part in parts if len(part.places) >= settings.small_threshold]
    for folder in dict.fromkeys(part.folder for part in small):
        group = [part for part in small if part.folder == folder]
        if folder is None:
            notes += [_left_out([part], f"small_threshold {settings.small_threshold}") for part in group]
        elif sum(len(part.places) for part in group) < settings.drop_threshold:
            notes.append(_left_out(group, f"drop_threshold {settings.drop_threshold}"))
        else:
            kept += _merged(folder, group, notes)
    return kept


def _left_out(parts: Sequence[_Part], threshold: str) -> str:
    rows = sum(len(part.places) for part in parts)
    return f"WARNING: {rows} rows are not trained on, fewer than {threshold}: {_listed(parts)}"


def _merged(folder: str, parts: Sequence[_Part], notes: list[str]) -> list[_Part]:
    """Merge the parts whose settings agree: one batch cannot have two group sizes."""
    groups: dict[tuple[object, ...], list[_Part]] = {}
    for part in parts:
        settings = (part.in_batch_negatives, part.batch_size, part.train_group_size, part.type)
        groups.setdefault(settings, []).append(part)
    name = Path(os.path.abspath(folder)).name
    for group in groups.values():
        if len(group) > 1:
            notes.append(f"{len(group)} small files of '{folder}' are one dataset, '{name}': {_listed(group)}")
    return [
        group[0]
        if len(group) == 1
        else replace(group[0], name=name, places=np.concatenate([part.places for part in group]))
        for group in groups.values()
    ]


def _listed(parts: Sequence[_Part]) -> str:
    shown = ", ".join(f"'{part.name}' ({len(part.places)})" for part in parts[:10])
    return f"{shown} and {len(parts) - 10} more" if len(parts) > 10 else shown
