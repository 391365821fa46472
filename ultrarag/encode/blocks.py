"""Many texts encoded to disk block by block, resumably; one that cannot be encoded stops no other.

A block is `chunk_texts` neighbouring texts. It is encoded, written, and only then marked as done; a mark survives
`kill -9` and a power cut, so that a process that is started again encodes the blocks without one. The mark is the rows
that were committed (`encode_rest`), a file per block (`Encoded`, in ranks.py) or a line per block (`Ledger`).
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ultrarag.encoder import Cuts
from ultrarag.errors import DataError, FingerprintError
from ultrarag.io import progress_bar, resource_error, write_bytes
from ultrarag.types import Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder


#: Texts of a block of neighbouring files: what a kill may lose.
CHUNK_TEXTS = 4096
#: Most blocks of a ledger: Ray's driver holds an entry for each, and a list of them all.
MOST_BLOCKS = 20_000
#: Seconds between two syncs of a ledger.
SYNC_EVERY = 1.0

#: Writes a block and marks it as done: its number, its texts, and their vectors (None where it has no texts).
Write = Callable[[int, Sequence[str | Passage], Embeddings | None], None]


#: What a note means that lacks a name: earlier versions did not know it, and it is left out where it is usual.
USUAL = {"precision": "fp32"}


def same_work(note: Path, made_by: dict[str, Any], remedy: str) -> bool:
    """Whether an earlier run noted that it began this work; False where there is no note.

    Names that are missing in a nested part, since an earlier version did not note them, are not compared.

    Args:
        made_by: whatever decides the vectors, as JSON: model, settings, source.

    Raises:
        FingerprintError: the folder's vectors are another model's.
        DataError: they are made of something else, or the note is damaged.
    """
    if not note.is_file():
        return False
    folder, wanted = note.parent, {**USUAL, **json.loads(json.dumps(made_by))}
    try:
        found: dict[str, Any] = {**USUAL, **json.loads(note.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise DataError(f"'{note}' is damaged ({error}): {remedy}") from error
    found.pop("finished", None)
    different = [name for name in {**wanted, **found} if not _same(found.get(name), wanted.get(name))]
    if "fingerprint" in different:
        raise FingerprintError(f"'{folder}' holds vectors of another model: {remedy}")
    if different:
        values = f"{found.get(different[0])!r:.120}, now {wanted.get(different[0])!r:.120}"
        raise DataError(f"'{folder}' was begun with another {', '.join(different)} ({values}): {remedy}")
    return True


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return all(found[name] == wanted[name] for name in found.keys() & wanted.keys())
    return bool(found == wanted)


def encode_blocks(
    encoder: Encoder,
    blocks: Iterable[tuple[int, Sequence[str | Passage]]],
    write: Write,
    *,
    chunk_texts: int,
    total: int,
    done: int = 0,
    label: str = "encode",
    heads: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Encode numbered blocks of at most `chunk_texts` passages, and write each one.

    The next block is tokenized while one is encoded, unless that is a short one. Texts that were cut are counted, and
    logged once.

    Args:
        total: texts altogether, for the bar; `done` of them by earlier runs.
    """
    cuts, source, begun = Cuts(), iter(blocks), deque[tuple[int, Sequence[str | Passage]]]()

    def texts_from(first: tuple[int, Sequence[str | Passage]]) -> Iterator[str | Passage]:
        """The texts of full blocks and of the first that is not full, which ends the encoder's chunks."""
        for block in chain([first], source):
            begun.append(block)
            yield from block[1]
            if len(block[1]) < chunk_texts:
                return

    with progress_bar(total, label, "text", progress) as bar:
        bar.update(done)
        options: dict[str, Any] = {"heads": heads, "batch_tokens": batch_tokens, "cuts": cuts}
        for first in source:
            texts = texts_from(first)
            for vectors in encoder.iter_encode(
                texts, "passage", chunk_texts=chunk_texts, on_batch=bar.update, **options
            ):
                write(*begun.popleft(), vectors)
            while begun:  # one without texts
                write(*begun.popleft(), None)
    cuts.tell()


class Growing(Protocol):
    """Vectors of texts 0, 1, 2, ... on disk, of which the first `rows` are committed; such as `Vectors`."""

    rows: int

    def append(self, embeddings: Embeddings) -> None: ...
    def commit(self) -> None: ...


def encode_rest(
    encoder: Encoder, target: Growing, texts: Iterable[str | Passage], total: int, chunk_texts: int, **options: Any
) -> None:
    """Encode the texts after those that `target` has, which make `total` with them, and commit each block."""

    def write(block: int, texts: Sequence[str | Passage], vectors: Embeddings | None) -> None:
        if vectors is not None:
            target.append(vectors)
            target.commit()

    source = iter(texts)
    blocks = enumerate(iter(lambda: list(islice(source, chunk_texts)), []))
    encode_blocks(encoder, blocks, write, chunk_texts=chunk_texts, total=total, done=target.rows, **options)


class Blocks:
    """The rows after `first`, up to `last`, in numbered blocks of `chunk_texts`, in whatever order they are done."""

    def __init__(self, first: int, last: int, chunk_texts: int) -> None:
        self.first, self.last, self.chunk_texts = first, last, chunk_texts

    def is_done(self, block: int) -> bool:
        """Whether a block has its mark."""
        raise NotImplementedError

    def missing(self) -> list[int]:
        """The blocks without a mark."""
        return [block for block in range(self.block_of(self.last) + 1) if not self.is_done(block)]

    def block_of(self, row: int) -> int:
        """The block of a row; rows count from 1, and those up to `first` are in none: -1."""
        return (row - self.first - 1) // self.chunk_texts

    def rows_of(self, block: int) -> tuple[int, int]:
        """The rows of a block: those after the first number, up to the second."""
        start = self.first + block * self.chunk_texts
        return start, start + self.chunk_texts


class Ledger(Blocks):
    """Blocks marked in one file: a line that says of what, then a line for each block, with its number of passages.

    It is for blocks that are written to a server, and for one process that marks them. A line is written after the
    server has confirmed all the vectors of its block, so the ledger may be behind the server, never ahead: a block
    that is there and has no line is encoded and written again, over itself. So no line has to be on the disk at once;
    they are synced once a second.
    """

    def __init__(self, path: Path, collection: str, first: int, last: int, chunk_texts: int) -> None:
        """Open, or begin anew where the file is of another collection or other rows.

        Args:
            collection: where the vectors are.
            chunk_texts: rows of a block, unless that makes too many; where the file has blocks of another size, theirs.
        """
        super().__init__(first, last, max(chunk_texts, -(-(last - first) // MOST_BLOCKS), 1))
        self._path, self._made_by = path, {"collection": collection, "first": first}
        #: block -> its passages
        self.confirmed: dict[int, int] = {}
        self._read()
        self._begin()

    @property
    def passages(self) -> int:
        """The number of passages confirmed."""
        return sum(self.confirmed.values())

    def is_done(self, block: int) -> bool:
        """Whether a block has its line."""
        return block in self.confirmed

    def confirm(self, block: int, passages: int) -> None:
        """Mark a block that the server has."""
        self.confirmed[block] = passages
        self._file.write(f"{block} {passages}\n")
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_EVERY:
            self.sync()

    def forget(self, blocks: Iterable[int]) -> None:
        """Take back what turned out to be lost."""
        for block in blocks:
            self.confirmed.pop(block, None)
        self._file.close()
        self._begin()

    def sync(self) -> None:
        """Make every line durable."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _read(self) -> None:
        """Take the lines of an earlier start; the last one may be torn."""
        try:
            head, *lines = self._path.read_text(encoding="ascii").split("\n")[:-1]
            found: dict[str, Any] = json.loads(head)
            size = int(found.pop("size"))
            pairs = (line.split(" ") for line in lines)
            confirmed = {int(block): int(passages) for block, passages in pairs}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return  # not there, or damaged: everything is encoded again
        if found == self._made_by:
            self.chunk_texts, self.confirmed = size, confirmed

    def _begin(self) -> None:
        """Replace the file by one that holds what is confirmed, without a torn end, to go on with."""
        lines = [json.dumps({**self._made_by, "size": self.chunk_texts})]
        lines += [f"{block} {passages}" for block, passages in self.confirmed.items()]
        write_bytes(self._path, "".join(f"{line}\n" for line in lines).encode())
        self._file = open(self._path, "a", encoding="ascii")  # noqa: SIM115
        self._synced = time.monotonic()


Encode = Callable[[Sequence[str | Passage]], Embeddings]

#: Texts of which a sound encoder can encode one at least; with none of them it is the encoder that fails.
PROBES = ("dimension", "1", "a b c")
#: Characters of a reason that are kept.
REASON = 300


@dataclass
class Apart:
    """What became of some passages."""

    passages: list[Passage]
    #: a row for each passage; None without passages
    embeddings: Embeddings | None
    #: id -> why it could not be encoded
    failed: dict[str, str] = field(default_factory=dict)


def encode_apart(passages: Sequence[Passage], encode: Encode) -> Apart:
    """Encode passages together; where that fails, find the ones at fault and encode the others.

    Raises:
        Exception: what the encoder raises where it cannot encode anything, so that no passage is at fault.
    """
    found = _halved(list(passages), encode)
    if found.failed:
        _check_encoder(encode)
    return found


def _halved(passages: list[Passage], encode: Encode) -> Apart:
    if not passages:
        return Apart([], None)
    try:
        return _finite(passages, encode([passage.encodable for passage in passages]))
    except Exception as error:
        if resource_error(error, Path()):  # no passage is at fault
            raise
        if len(passages) == 1:
            _check_encoder(encode, error)
            return Apart([], None, {passages[0].id: _reason(error)})
    half = len(passages) // 2
    return _joined(_halved(passages[:half], encode), _halved(passages[half:], encode))


def _finite(passages: list[Passage], embeddings: Embeddings) -> Apart:
    """Leave out the rows that hold a value which is not finite."""
    sound = np.ones(len(passages), bool)
    for array in embeddings.arrays():
        sound &= np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if sound.all():
        return Apart(passages, embeddings)
    kept = [passage for passage, good in zip(passages, sound, strict=True) if good]
    failed = {p.id: "its vector is not finite" for p, good in zip(passages, sound, strict=True) if not good}
    return Apart(kept, embeddings[np.flatnonzero(sound)] if kept else None, failed)


def _joined(left: Apart, right: Apart) -> Apart:
    parts = [part for part in (left.embeddings, right.embeddings) if part is not None]
    embeddings = Embeddings.cat(parts) if parts else None
    return Apart(left.passages + right.passages, embeddings, left.failed | right.failed)


def _check_encoder(encode: Encode, error: Exception | None = None) -> None:
    """Raise where not even a probe can be encoded: then no passage is at fault."""
    for probe in PROBES:
        try:
            if all(np.isfinite(array).all() for array in encode([probe]).arrays()):
                return
        except Exception as other:
            error = error or other
    raise error or ValueError("the encoder gives vectors that are not finite, whatever the text")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:REASON]
