"""Linear maps of vectors: from one model's space into another's, without encoding anything again.

A map is fitted to pairs of vectors (`fit_ridge`) or learned in training, and belongs to one side of an asymmetric model
(docs/asymmetric.md). In numpy, so that a whole corpus is mapped block by block without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ultrarag.errors import CheckpointError, UsageError

#: The heads that a map can be of: those whose vectors have coordinates.
MAPPED_HEADS = ("dense", "colbert")
#: Penalties that are tried, as multiples of the mean variance of a coordinate.
_PENALTIES = tuple(float(10.0**power) for power in np.arange(-4, 5.01, 0.5))
#: Of every so many pairs one is held out.
_FOLD = 5
_WEIGHTS = "model.safetensors"
#: In a map's folder: the module of sentence-transformers that brings vectors to unit length.
NORMALIZE = "normalize"


@dataclass(frozen=True, eq=False)
class LinearMap:
    """v -> W v + b, then unit length where the model's vectors have it.

    Example:
        >>> import numpy as np
        >>> LinearMap.identity(2).apply(np.array([[3.0, 4.0]])).tolist()
        [[0.6..., 0.8...]]
    """

    #: (d, d) float32
    weight: np.ndarray
    #: (d,) float32
    bias: np.ndarray
    #: the result has unit length
    normalize: bool = True
    #: dense or colbert
    head: str = "dense"

    def __post_init__(self) -> None:
        weight, bias = (np.ascontiguousarray(array, dtype="<f4") for array in (self.weight, self.bias))
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or bias.shape != weight.shape[:1]:
            raise UsageError(f"a linear map is W (d, d) and b (d,), not W {weight.shape} and b {bias.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise UsageError("a linear map holds a value that is not finite")
        if self.head not in MAPPED_HEADS:
            raise UsageError(f"no map of the head '{self.head}': its values are no coordinates ({MAPPED_HEADS})")
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", bias)

    @classmethod
    def identity(cls, dim: int, normalize: bool = True, head: str = "dense") -> LinearMap:
        """The map that changes nothing but the length."""
        return cls(np.eye(dim, dtype=np.float32), np.zeros(dim, dtype=np.float32), normalize, head)

    @property
    def dim(self) -> int:
        """The width of the vectors, before and after."""
        return int(self.weight.shape[0])

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hexadecimal, of all that it is."""
        about = json.dumps([1, self.head, self.normalize, self.dim]).encode()
        return hashlib.sha256(about + self.weight.tobytes() + self.bias.tobytes()).hexdigest()

    def apply(self, vectors: np.ndarray) -> np.ndarray:
        """Map vectors, (..., d) -> (..., d) float32; a whole corpus is given block by block.

        Raises:
            UsageError: vectors of another width.
        """
        self._check_width(vectors)
        mapped = np.asarray(vectors, dtype=np.float32) @ self.weight.T
        mapped += self.bias
        return unit_length(mapped) if self.normalize else mapped

    def transposed(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Queries of the new space for passages that are still in the old one: (n, d) float32, and (n,) constants.

        q . (W v + b) = (W^T q) . v + q . b. The constant is the same for all passages, so that no ranking needs it.
        Exact before the mapped passage is brought to unit length, which no query can do for it.
        """
        self._check_width(queries)
        queries = np.asarray(queries, dtype=np.float32)
        return queries @ self.weight, queries @ self.bias

    def _check_width(self, vectors: np.ndarray) -> None:
        if np.shape(vectors)[-1:] != (self.dim,):
            raise UsageError(f"the map is of vectors of {self.dim} dimensions, not of shape {np.shape(vectors)}")

    def save(self, folder: Path) -> None:
        """Write it as a `Dense` module of sentence-transformers into a new folder."""
        from safetensors.numpy import save_file

        folder.mkdir()
        about = {"head": self.head, "normalize": json.dumps(self.normalize)}
        save_file({"linear.weight": self.weight, "linear.bias": self.bias}, folder / _WEIGHTS, metadata=about)
        config = {
            "in_features": self.dim,
            "out_features": self.dim,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if self.normalize:
            (folder / NORMALIZE).mkdir()
            (folder / NORMALIZE / "config.json").write_text("{}", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LinearMap:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / _WEIGHTS
        try:
            with safe_open(path, framework="np") as file:
                about: dict[str, Any] = file.metadata() or {}
                weight, bias = (file.get_tensor(f"linear.{name}") for name in ("weight", "bias"))
            return cls(weight, bias, bool(json.loads(about["normalize"])), about["head"])
        except (OSError, ValueError, KeyError, SafetensorError, UsageError) as error:
            raise CheckpointError(f"{path} is no linear map of ultrarag's: {type(error).__name__}: {error}") from error


def apply_chain(maps: Iterable[LinearMap], vectors: np.ndarray) -> np.ndarray:
    """Apply maps one after another; without any, the vectors themselves."""
    for item in maps:
        vectors = item.apply(vectors)
    return vectors


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """The vectors, (..., d), at length 1; a zero vector stays zero."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), dtype=np.float32)


class RidgeFit(NamedTuple):
    """A fitted map, and how well it does on pairs that it was not fitted to."""

    map: LinearMap
    #: how hard it is pulled towards the identity, as a multiple of the mean variance of a coordinate
    penalty: float
    #: mean squared distance of mapped and new vectors, on the held-out fifth
    error: float
    #: the same with the old vectors as they are
    identity_error: float


def fit_ridge(
    old: np.ndarray, new: np.ndarray, *, normalize: bool = True, head: str = "dense", seed: int = 0
) -> RidgeFit:
    """Fit old -> new vectors of the same texts, (n, d) each: least squares with a ridge towards the identity.

    Minimises the sum of |W v + b - v'|^2 plus penalty x |W - I|^2. The penalty is the one with the least error on a
    held-out fifth of the pairs; the map that is returned is fitted to all of them.

    Raises:
        UsageError: shapes that differ, fewer than ten pairs, or values that are not finite.
    """
    old, new = (np.asarray(side, dtype=np.float64) for side in (old, new))
    if old.ndim != 2 or old.shape != new.shape:
        raise UsageError(f"a map is fitted to pairs of vectors of the same width, not to {old.shape} and {new.shape}")
    if len(old) < 2 * _FOLD:
        raise UsageError(f"{len(old)} pairs of vectors are too few to fit a map to: give {2 * _FOLD} or more")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise UsageError("a vector to fit a map to holds a value that is not finite")
    held = np.zeros(len(old), dtype=bool)
    held[np.random.default_rng(seed).permutation(len(old))[: len(old) // _FOLD]] = True
    fitted = _Ridge(old[~held], new[~held])
    candidates = [(penalty, fitted.map(penalty, normalize, head)) for penalty in _PENALTIES]
    errors = [_error(item.apply(old[held]), new[held]) for _, item in candidates]
    best = int(np.argmin(errors))
    whole = _Ridge(old, new).map(_PENALTIES[best], normalize, head)
    return RidgeFit(whole, _PENALTIES[best], errors[best], _error(old[held], new[held]))


class _Ridge:
    """The sums of a least-squares problem, decomposed once for all penalties."""

    def __init__(self, old: np.ndarray, new: np.ndarray) -> None:
        self.old_mean, self.new_mean = old.mean(0), new.mean(0)
        centred = old - self.old_mean
        self.values, self.axes = np.linalg.eigh(centred.T @ centred)
        self.cross = self.axes.T @ (centred.T @ (new - self.new_mean))
        self.scale = max(float(self.values.mean()), 1e-12)

    def map(self, penalty: float, normalize: bool, head: str) -> LinearMap:
        strength = penalty * self.scale
        solved = (self.cross + strength * self.axes.T) / (np.maximum(self.values, 0) + strength)[:, None]
        weight = (self.axes @ solved).T
        bias = self.new_mean - weight @ self.old_mean
        return LinearMap(weight.astype(np.float32), bias.astype(np.float32), normalize, head)


def _error(mapped: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.square(mapped - wanted).sum(1).mean())
