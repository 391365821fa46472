"""Codes of token vectors: the nearest of a few centroids, and what remains, with a few bits for each dimension.

A refinement may follow: what the levels leave of each value, in a byte, as a share of the largest of the token's.

What remains is rotated at random, so that its values are spread like a normal distribution's whatever the model,
divided by its size, and each value is rounded to the nearest of the levels that lose least there. The size is kept with
each token, so that vectors unlike those that the centroids were chosen for are coded as well, only with a larger rest.

Source:
    Residual codes: ColBERTv2 (Santhanam et al., 2022). Levels: Max, Quantizing for minimum distortion (1960). The
    rotation before rounding: RaBitQ (Gao and Long, 2024), TurboQuant (Zandieh et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np

from ultrarag.errors import DataError
from ultrarag.retrieve.engines.plaid.clusters import kmeans

#: The levels above 0 that lose least of a standard normal distribution, by bits.
LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
#: Centroids, at most: a byte names one.
CENTROIDS = 256
#: Vectors that the centroids are chosen by, at most.
SAMPLE = 65_536
#: Tokens coded or scored at a time: as float32 they fit into a processor's cache.
BLOCK = 4096
#: Bytes before the levels: the centroid, and the size as float16.
_HEAD = 3
#: What the largest value of a refinement, of eight bits, is written as.
_LARGEST = 127
#: The smallest float16 above 0: what is divided by a smaller one is 0.
_SMALLEST = 6e-8


@dataclass(frozen=True)
class Whole:
    """Token vectors as they are, float32: for so few that nothing need be saved."""

    dim: int

    @property
    def size(self) -> int:
        """Bytes of a token."""
        return 4 * self.dim

    @property
    def rest_size(self) -> int:
        """Bytes of a refinement: there is none."""
        return 0

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """The bytes of token vectors, (tokens, dim): (tokens, size) uint8."""
        return np.ascontiguousarray(vectors, "<f4").view(np.uint8).reshape(-1, self.size)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The token vectors, (tokens, dim) float32."""
        return np.ascontiguousarray(codes).view("<f4").reshape(-1, self.dim)

    def products(self, query: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Inner products of query tokens, (asked, dim), with these: (tokens, asked) float32."""
        found: np.ndarray = self.decode(codes) @ query.T
        return found


@dataclass(frozen=True)
class Coder:
    """How token vectors become codes."""

    bits: int
    #: (centroids, dim) float32
    centroids: np.ndarray
    #: bits of a refinement for each dimension: 0 or 8
    rest: int = 0

    @classmethod
    def train(cls, bits: int, sample: np.ndarray, rest: int = 0) -> Coder:
        """Choose the centroids by k-means over token vectors, (tokens, dim)."""
        if len(sample) > SAMPLE:
            sample = sample[np.random.default_rng(0).choice(len(sample), SAMPLE, replace=False)]
        return cls(bits, kmeans(sample, max(1, min(CENTROIDS, len(sample) // 8))), rest)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.centroids.shape[1])

    @property
    def size(self) -> int:
        """Bytes of a token's code, without its refinement."""
        return _HEAD + 2 * (len(self.rotation) // self.each)

    @property
    def rest_size(self) -> int:
        """Bytes of a token's refinement: its largest value as float16, and a byte for each value."""
        return 2 + len(self.rotation) if self.rest else 0

    @property
    def each(self) -> int:
        """Levels that two bytes name; of three bits they are five."""
        return 16 // self.bits

    @cached_property
    def levels(self) -> np.ndarray:
        """All levels in ascending order, (2 ** bits,) float32."""
        above = LEVELS[self.bits]
        return np.array([*(-level for level in reversed(above)), *above], np.float32)

    @cached_property
    def rotation(self) -> np.ndarray:
        """(width of the rest, dim) float32, with orthonormal columns; each two bytes name whole levels of the rest."""
        width = -(-self.dim // self.each) * self.each
        random = np.random.default_rng(0).normal(size=(width, width))
        return np.ascontiguousarray(np.linalg.qr(random)[0][:, : self.dim], np.float32)

    @cached_property
    def _unpacked(self) -> np.ndarray:
        """The levels that two bytes of a code stand for, (65536, each) float32."""
        shifts = self.bits * np.arange(self.each, dtype=np.uint32)
        return self.levels[(np.arange(65536, dtype=np.uint32)[:, None] >> shifts) & (2**self.bits - 1)]

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes of token vectors, (tokens, dim) float32, each with its refinement: (tokens, size + rest_size) uint8.

        Raises:
            DataError: one is longer than a code can say.
        """
        codes = np.empty((len(vectors), self.size + self.rest_size), np.uint8)
        for start in range(0, len(vectors), BLOCK):
            codes[start : start + BLOCK] = self._encode(np.asarray(vectors[start : start + BLOCK], np.float32))
        return codes

    def _encode(self, vectors: np.ndarray) -> np.ndarray:
        half = (self.centroids**2).sum(1) / 2
        nearest = (vectors @ self.centroids.T - half).argmax(1)
        rest = (vectors - self.centroids[nearest]) @ self.rotation.T
        spread = np.sqrt((rest**2).mean(1, keepdims=True))
        rest /= np.maximum(spread, np.finfo(np.float32).tiny)
        places = np.zeros(rest.shape, np.uint16)
        for bound in (self.levels[1:] + self.levels[:-1]) / 2:
            places += rest > bound
        rounded = self.levels[places]
        # the size by which products with the rest are right on average, as in RaBitQ; the one nearest to the rest
        # makes products smaller, each by how much it was rounded: of the ten best, 2 bits find 0.908 instead of 0.923
        size = spread[:, 0] * rest.shape[1] / np.maximum((rest * rounded).sum(1), 1e-9)
        if size.max(initial=0) > np.finfo(np.float16).max:
            raise DataError(
                f"a token vector has the length {np.linalg.norm(vectors, axis=1).max():.3g}: it is too long"
            )
        shifts = (self.bits * np.arange(self.each)).astype(np.uint16)
        groups = places.reshape(len(vectors), -1, self.each) << shifts
        words = np.bitwise_or.reduce(groups, axis=2)
        codes = np.empty((len(vectors), self.size + self.rest_size), np.uint8)
        codes[:, 0] = nearest
        codes[:, 1:_HEAD] = size.astype("<f2")[:, None].view(np.uint8)
        codes[:, _HEAD : self.size] = words.astype("<u2").view(np.uint8)
        if self.rest:
            rest *= (spread[:, 0] / np.maximum(size.astype("<f2").astype(np.float32), _SMALLEST))[:, None]
            codes[:, self.size :] = _refinement(rest - rounded)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The token vectors that codes stand for, with or without their refinement, (tokens, dim) float32."""
        vectors = np.empty((len(codes), self.dim), np.float32)
        for start in range(0, len(codes), BLOCK):
            nearest, size, rest = self._read(codes[start : start + BLOCK])
            vectors[start : start + BLOCK] = self.centroids[nearest] + (rest * size) @ self.rotation
        return vectors

    def products(self, query: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Inner products of query tokens, (asked, dim), with coded ones: (tokens, asked) float32."""
        found = np.empty((len(codes), len(query)), np.float32)
        whole, rotated = self.centroids @ query.T, self.rotation @ query.T
        for start in range(0, len(codes), BLOCK):
            nearest, size, rest = self._read(codes[start : start + BLOCK])
            part = rest @ rotated
            part *= size
            part += whole[nearest]
            found[start : start + BLOCK] = part
        return found

    def _read(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The centroid of each token, the size of its rest, (tokens, 1), and the rest, (tokens, width)."""
        size = np.ascontiguousarray(codes[:, 1:_HEAD]).view("<f2").astype(np.float32)
        words = np.ascontiguousarray(codes[:, _HEAD : self.size]).view("<u2")
        rest = self._unpacked.take(words, axis=0).reshape(len(codes), -1)  # [words] takes 20 times as long
        if codes.shape[1] > self.size:
            largest = np.ascontiguousarray(codes[:, self.size : self.size + 2]).view("<f2").astype(np.float32)
            rest += codes[:, self.size + 2 :].view(np.int8) * (largest / _LARGEST)
        return codes[:, 0], size, rest

    def write(self, file: BinaryIO) -> None:
        """Write to a file that `read` takes."""
        np.save(file, np.array([self.bits, self.rest], np.int64))
        np.save(file, self.centroids)

    @classmethod
    def read(cls, file: BinaryIO) -> Coder:
        """Read what `write` wrote."""
        bits, *rest = np.load(file).tolist()  # files of before there were refinements name the bits alone
        return cls(bits, np.load(file), *rest)


def _refinement(left: np.ndarray) -> np.ndarray:
    """What levels left of values, (tokens, width), in bytes, (tokens, 2 + width) uint8."""
    largest = np.abs(left).max(1, keepdims=True).astype("<f2")
    scaled = left * (_LARGEST / np.maximum(largest.astype(np.float32), _SMALLEST))
    values = np.clip(np.rint(scaled), -_LARGEST, _LARGEST).astype(np.int8)
    return np.concatenate([largest.view(np.uint8), values.view(np.uint8)], axis=1)
