"""A segment: some passages with their ids, lengths and inverted lists, as one block of bytes that never changes.

It lies in a file that is mapped into memory, or in memory itself. Passages have row numbers from 0; which of them are
dead by now is known outside. Layout: magic, length of the header, header (JSON: rows, tokens, name -> type, shape and
offset), arrays at multiples of 8.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ultrarag.errors import IndexStateError
from ultrarag.io import replacing
from ultrarag.retrieve.bm25.compressor import Compressor, smallest
from ultrarag.retrieve.bm25.lists import Arrays, Inverted, Lists

#: Ids whose places are Python integers at a time.
SPANS = 1 << 16
Content: TypeAlias = "bytes | mmap.mmap"
#: The last byte is the version; 2 lacks the packed lists, which the code of then would silently leave out of version 3.
_MAGIC = b"URBM25\x00\x03"
_READ = (b"URBM25\x00\x02", _MAGIC)
_TYPES = {"<u1": "|u1", "|u1": "|u1", "<u2": "<u2", "<u4": "<u4", "<u8": "<u8", "<f8": "<f8"}


class Segment:
    """Passages by row: their ids, their lengths in tokens, and the lists of what they hold."""

    def __init__(self, content: Content) -> None:
        """Raises ValueError when the content is no segment; only a checksum tells whether it is whole."""
        self.content = content
        start = len(_MAGIC) + 4
        if len(content) < start or content[: len(_MAGIC)] not in _READ:
            raise ValueError("it does not begin as a segment does")
        data = start + int.from_bytes(content[len(_MAGIC) : start], "little")
        header = json.loads(content[start:data])
        data += -data % 8
        arrays = {
            name: np.frombuffer(content, kind, int(np.prod(shape)), data + offset).reshape(shape)
            for name, (kind, shape, offset) in header["arrays"].items()
        }
        #: passages, dead ones included, and all their tokens
        self.rows, self.tokens = int(header["rows"]), int(header["tokens"])
        #: (rows,) tokens of each passage
        self.lengths = arrays["lengths"]
        self._id_bytes = arrays["id_bytes"]
        self._id_ends = np.zeros(self.rows + 1, "<u4" if len(self._id_bytes) < 1 << 32 else "<u8")
        np.cumsum(arrays["id_lengths"], out=self._id_ends[1:])
        self._hashes, self._hashed = arrays["id_hashes"], arrays["id_rows"]
        self.lists = Lists(arrays, self.rows)

    def id_bytes(self, rows: np.ndarray) -> list[bytes]:
        """The ids of rows, as UTF-8."""
        ends, whole = self._id_ends, self._id_bytes
        return [whole[ends[row] : ends[row + 1]].tobytes() for row in rows.tolist()]

    def id_words(self, rows: np.ndarray, word: int) -> np.ndarray:
        """Eight bytes of each id from 8 x word on, zeros after its end, as numbers that sort as they do."""
        starts = self._id_ends[rows].astype(np.int64) + 8 * word
        ends = self._id_ends[rows + 1].astype(np.int64)
        found = np.zeros(len(rows), np.uint64)
        for byte in range(8):
            there = starts + byte < ends
            value = self._id_bytes[np.where(there, starts + byte, 0)].astype(np.uint64)
            found = (found << np.uint64(8)) | np.where(there, value, np.uint64(0))
        return found

    def rows_of(self, ids: Sequence[bytes], hashes: np.ndarray) -> np.ndarray:
        """The last row of each id, -1 where it has none, dead rows included; `hashes` are the ids' `id_hashes`."""
        rows = np.full(len(ids), -1, np.int64)
        places = self._hashes.searchsorted(hashes)
        places[places == self.rows] = 0
        for which in np.flatnonzero(self._hashes[places] == hashes).tolist() if self.rows else ():
            at = int(places[which])
            while at < self.rows and self._hashes[at] == hashes[which]:
                row = int(self._hashed[at])
                if self._id_bytes[self._id_ends[row] : self._id_ends[row + 1]].tobytes() == ids[which]:
                    rows[which] = row
                at += 1
        return rows

    def ids_between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The lengths of the ids of rows, and their bytes one after another."""
        ends = self._id_ends[first : last + 1].astype(np.int64)
        return np.diff(ends), self._id_bytes[ends[0] : ends[-1]]


def id_hashes(ids: Iterable[bytes]) -> np.ndarray:
    """32 bits of each id, by which it is found."""
    return np.fromiter(map(zlib.crc32, ids), np.uint32)


def compressed(
    id_lengths: np.ndarray,
    id_bytes: np.ndarray,
    lengths: np.ndarray,
    pieces: Iterable[Inverted],
    k1: float,
    b: float,
) -> list[bytes]:
    """The bytes of a segment, part after part.

    Args:
        id_lengths: (rows,) bytes of each id, whose bytes follow one another in `id_bytes`.
        lengths: (rows,) tokens of each passage.
        pieces: its lists, in ascending order of their keys from piece to piece.
    """
    rows, tokens = len(lengths), int(lengths.sum())
    compressor = Compressor(lengths, norms(k1, b, tokens / rows if tokens else 1.0))
    for piece in pieces:
        compressor.add(piece)
    ends = np.concatenate([[0], np.cumsum(id_lengths)])
    whole = id_bytes.tobytes()
    hashes = id_hashes(whole[start:end] for start, end in _spans(ends))
    order = np.argsort(hashes, kind="stable")
    arrays = {
        "lengths": smallest(lengths, 1),
        "id_lengths": smallest(id_lengths, 1),
        "id_bytes": id_bytes,
        "id_hashes": hashes[order],
        "id_rows": order.astype("<u4"),
        **compressor.arrays(),
    }
    return _laid_out(rows, tokens, arrays)


def _spans(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where each id begins and ends; a part at a time: ten million Python integers are 400 MB."""
    for at in range(0, len(ends) - 1, SPANS):
        part = ends[at : at + SPANS + 1].tolist()
        yield from pairwise(part)


def norms(k1: float, b: float, mean: float) -> tuple[float, float]:
    """k1 (1 - b + b length / mean) as what is fixed and what is times the length."""
    return k1 * (1 - b), k1 * b / mean


def _laid_out(rows: int, tokens: int, arrays: Arrays) -> list[bytes]:
    entries, parts, offset = {}, [], 0
    for name, array in arrays.items():
        content = np.ascontiguousarray(array).tobytes()
        entries[name] = [_TYPES[array.dtype.str], array.shape, offset]
        parts += [content, bytes(-len(content) % 8)]
        offset += len(content) + -len(content) % 8
    header = json.dumps({"rows": rows, "tokens": tokens, "arrays": entries}, separators=(",", ":")).encode()
    header += b" " * (-(len(_MAGIC) + 4 + len(header)) % 8)
    return [_MAGIC, len(header).to_bytes(4, "little"), header, *parts]


def in_memory(parts: Iterable[bytes]) -> Segment:
    """A segment that lies in memory."""
    return Segment(b"".join(parts))


def write(path: Path, parts: Iterable[bytes]) -> tuple[Segment, int]:
    """Write a segment into a file, atomically and durably, and map it; also its CRC-32."""
    crc = 0
    with replacing(path) as file:
        for part in parts:
            crc = zlib.crc32(part, crc)
            file.write(part)
    return mapped(path), crc


def mapped(path: Path) -> Segment:
    """Map the file of a segment.

    Raises:
        IndexStateError: when it is missing or begins as no segment does.
    """
    try:
        with open(path, "rb") as file:
            return Segment(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise IndexStateError(f"'{path}' is missing; rebuild the words from the passages") from None
    except (ValueError, KeyError, TypeError) as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); rebuild the words from the passages") from None
