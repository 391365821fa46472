"""From plain lists to the arrays in which a segment holds them; `lists` says how, and reads them."""

from __future__ import annotations

import numpy as np

from ultrarag.retrieve.bm25.lists import WIDTHS, WINDOW, Arrays, Inverted
from ultrarag.retrieve.bm25.unary import as_bits

#: A list is dense when it holds more than one row in so many, and more than LEAST_DENSE.
SPARSENESS, LEAST_DENSE = 100, 256
#: Others of more entries than this are packed where that takes less; shorter ones are read in fewer calls of numpy.
LEAST_PACKED = 256


class Compressor:
    """Takes lists in ascending order of their keys, piece after piece, and gives them compressed."""

    def __init__(self, lengths: np.ndarray, norms: tuple[float, float]) -> None:
        """`lengths` are those of the segment's rows; a frequency's norm is norms[0] + norms[1] x length."""
        self._lengths, self._norms = lengths, norms
        self._rows = len(lengths)
        self._coarse = max(1, -(-self._rows // 65536))
        self._windows = max(1, -(-self._rows // WINDOW))
        self._pieces: list[list[Arrays]] = [[], [], [], []]

    def add(self, lists: Inverted) -> None:
        """Compress a piece; its keys come after all those before."""
        for kind, chosen in enumerate(self._kinds(lists)):
            if chosen.any():
                kept = np.repeat(chosen, lists.counts)
                part = Inverted(lists.keys[chosen], lists.counts[chosen], lists.rows[kept], lists.numbers[kept])
                stored = (self._rare, self._mid, self._dense, self._packed)[kind](part)
                self._pieces[kind].append(stored | _plain(part))

    def arrays(self) -> Arrays:
        """All that `Lists` reads."""
        made: Arrays = {}
        for kind, pieces in enumerate(self._pieces):
            starts = np.concatenate([[0], np.cumsum(_joined(pieces, "counts", np.int64))])
            made[f"keys{kind}"] = _joined(pieces, "keys", np.uint64)
            made[f"starts{kind}"] = smallest(starts, 4)
            made[f"rows{kind}"] = _joined(pieces, "rows", ("<u4", "<u2", "<u1", "<u1")[kind])
            for name, array in _coded(pieces).items():
                made[f"{name}{kind}"] = array
        made["windows1"] = smallest(_joined(self._pieces[1], "windows", np.int64, self._coarse - 1), 2)
        made["counts2"] = _joined(self._pieces[2], "windows", "<u1", self._windows)
        made["most2"] = _joined(self._pieces[2], "most", "<u1", self._windows)
        made["windows3"] = _joined(self._pieces[3], "windows", "<u1")
        return made

    def _kinds(self, lists: Inverted) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        dense = (lists.counts * SPARSENESS > self._rows) & (lists.counts > LEAST_DENSE)
        if dense.any():  # a row with several numbers has several entries: windows would overflow
            lists_of = np.repeat(np.arange(len(lists.counts)), lists.counts)
            twice = np.flatnonzero((np.diff(lists.rows) == 0) & (np.diff(lists_of) == 0))
            dense[lists_of[twice]] = False
        packed = ~dense & (lists.counts * 7 > self._windows) & (lists.counts > LEAST_PACKED)  # 9 bits and these for 16
        mid = ~dense & ~packed & (lists.counts > 2 * (self._coarse - 1))
        return ~dense & ~packed & ~mid, mid, dense, packed

    def _rare(self, part: Inverted) -> Arrays:
        return {"rows": part.rows.astype("<u4")}

    def _mid(self, part: Inverted) -> Arrays:
        within = _per_window(part, 16, self._coarse)[0].cumsum(axis=1)
        return {"rows": (part.rows & 0xFFFF).astype("<u2"), "windows": within[:, :-1]}

    def _packed(self, part: Inverted) -> Arrays:
        windows = as_bits(part.rows >> 8, part.counts, self._windows)
        return {"rows": (part.rows & 0xFF).astype("<u1"), "windows": windows}

    def _dense(self, part: Inverted) -> Arrays:
        counts, cells = _per_window(part, 8, self._windows)
        positive = np.maximum(part.numbers, 0)
        gains = positive / (positive + self._norms[0] + self._norms[1] * self._lengths[part.rows])
        most = np.zeros(counts.size)
        first = np.flatnonzero(np.diff(cells, prepend=-1))
        most[cells[first]] = np.maximum.reduceat(gains, first)
        highest = np.ceil(most * 255 * (1 + 1e-12)).reshape(counts.shape)
        highest[(highest == 0) & (counts > 0)] = 1  # tells a count of 256, which is 0 as 8 bits, from one of 0
        return {
            "rows": (part.rows & 0xFF).astype("<u1"),
            "windows": (counts & 0xFF).astype("<u1"),
            "most": highest.clip(0, 255).astype("<u1"),
        }


def _per_window(part: Inverted, bits: int, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries of each list in each window of 2^bits rows, (lists, windows), and the cell that each entry is in."""
    cells = np.repeat(np.arange(len(part.counts)) * windows, part.counts) + (part.rows >> bits)
    counts = np.bincount(cells, minlength=len(part.counts) * windows)
    return counts.reshape(len(part.counts), windows), cells


def _plain(part: Inverted) -> Arrays:
    """What all ways store of a list; numbers as codes, 0 for those that no code stands for."""
    codes = np.where((part.numbers >= 1) & (part.numbers <= 15), part.numbers, 0).astype(np.uint8)
    codes[codes != part.numbers] = 0
    return {"keys": part.keys, "counts": part.counts, "codes": codes, "odd": part.numbers[codes == 0]}


def _coded(pieces: list[Arrays]) -> Arrays:
    """The numbers of a way, in the width that takes the least."""
    codes, beyond = _joined(pieces, "codes", np.uint8), _joined(pieces, "odd", np.float64)
    apart = {bits: (codes == 0) | (codes > largest) for bits, largest in WIDTHS.items()}
    cost = {bits: len(codes) * bits // 8 + 5 * int(np.count_nonzero(odd)) for bits, odd in apart.items()}
    bits = min(cost, key=lambda bits: cost[bits])
    odd_at = np.flatnonzero(apart[bits])
    odd = codes[odd_at].astype(np.float64)
    odd[odd == 0] = beyond
    codes[odd_at] = 0
    whole = (odd == np.floor(odd)).all() and odd.min(initial=0) >= 0 and odd.max(initial=0) < 1 << 16
    packed = np.zeros(0, np.uint8)
    if bits:
        per = 8 // bits
        grouped = np.concatenate([codes, np.zeros(-len(codes) % per, np.uint8)]).reshape(-1, per)
        packed = np.bitwise_or.reduce(grouped << (np.arange(per, dtype=np.uint8) * bits).astype(np.uint8), axis=1)
    return {
        "bits": np.array([bits], np.uint8),
        "codes": packed,
        "odd_at": smallest(odd_at, 4),
        "odd": smallest(odd, 1) if whole else odd,
    }


def smallest(numbers: np.ndarray, least: int) -> np.ndarray:
    """Numbers of at least 0 as unsigned integers of as few bytes as hold them, and not fewer than `least`."""
    most = int(numbers.max(initial=0))
    return numbers.astype(f"<u{max(least, next(size for size in (1, 2, 4, 8) if most < 1 << 8 * size))}")


def _joined(pieces: list[Arrays], name: str, kind: object, width: int | None = None) -> np.ndarray:
    empty = np.zeros(0 if width is None else (0, width), kind)  # type: ignore[call-overload]
    return np.concatenate([empty, *(piece[name] for piece in pieces)]).astype(kind)  # type: ignore[call-overload]
