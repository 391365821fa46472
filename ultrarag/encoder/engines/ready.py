"""Ready queries: what a compiled encoder left behind, from which a later process encodes queries without torch.

The compiled model lies in the cache or beside the checkpoint anyway. Kept here are the tokenizer and what was declared
when it was compiled. They are found by the encoder's fingerprint, and used only with the same packages and threads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag.encoder.engines.files import keep_files, kept_file, sound_folder
from ultrarag.encoder.engines.openvino_runtime import (
    Requests,
    compiled_float,
    compiled_int8,
    head_key,
    model_key,
    openvino,
    runtime_versions,
)
from ultrarag.encoder.engines.quantised import MODEL, Quantised, checked_files, is_int8
from ultrarag.errors import CheckpointError

_RECORD, _TOKENIZER = "ready.json", "tokenizer.json"
FORMAT = 1


@dataclass(frozen=True)
class Ready:
    """What was known of a compiled encoder."""

    #: `EncoderSettings`, as plain values
    settings: dict[str, Any]
    #: tokens of a query, at most
    limit: int | None
    #: what stands for a text without tokens
    fallback: int
    #: whether names of special tokens in a text are read as text
    split_special_tokens: bool
    #: names of the model's inputs, in order
    inputs: tuple[str, ...]
    #: of torch, for which an engine was chosen
    threads: int
    #: forwards at a time
    streams: int

    def keep(self, fingerprint: str, precision: str, tokenizer: str) -> None:
        """Write it, with the tokenizer as JSON; nothing where the cache cannot be written to."""
        record = json.dumps({"format": FORMAT, **asdict(self)})
        keep_files("ready", _key(fingerprint, precision), {_RECORD: record, _TOKENIZER: tokenizer})


def is_kept(fingerprint: str, precision: str) -> bool:
    """Whether something is kept for an encoder that can be read; what cannot is to be replaced."""
    return _read(_folder(fingerprint, precision), tell=False) is not None


class ReadyQueries:
    """Encodes queries, in any thread."""

    def __init__(self, record: Ready, tokenizer: QueryTokenizer, forward: Requests) -> None:
        self.record, self._tokenizer, self._forward = record, tokenizer, forward

    @classmethod
    def read(
        cls, fingerprint: str, precision: str, checkpoint: Path, fits: Callable[[Ready], bool]
    ) -> ReadyQueries | None:
        """What is kept for an encoder, compiled; None where nothing is, or it is not sound.

        Args:
            checkpoint: its folder, in which what is quantised lies.
            fits: whether it may be used, before the model is read.
        """
        folder = _folder(fingerprint, precision)
        record = _read(folder)
        if record is None:
            return None
        forward = _forward(record, fingerprint, precision, checkpoint) if fits(record) else None
        if forward is None or not forward.gives_dense:
            return None
        text = (folder / _TOKENIZER).read_text(encoding="utf-8")
        return cls(record, QueryTokenizer(text, record), forward)

    def dense(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """The vectors of rendered queries, (texts, dim) float32, and how many of them were cut."""
        ids, cut = self._tokenizer(texts)
        return np.concatenate([self._forward.dense([row]) for row in ids]), cut


class QueryTokenizer:
    """A tokenizer of its own, which cuts queries, pads none, and needs nothing but the package tokenizers."""

    def __init__(self, content: str, record: Ready) -> None:
        from tokenizers import Tokenizer

        self._backend, self._fallback = Tokenizer.from_str(content), record.fallback
        self._backend.encode_special_tokens = record.split_special_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The token ids of texts, and how many of them were cut."""
        found = self._backend.encode_batch(list(texts))
        return [row.ids or [self._fallback] for row in found], sum(bool(row.overflowing) for row in found)


def tokenizer_for(backend: Any, limit: int | None, direction: str) -> str:
    """A fast tokenizer as JSON, which cuts texts at a limit and pads none."""
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(backend.to_str())
    own.no_padding()
    if limit is None:
        own.no_truncation()
    else:
        own.enable_truncation(max_length=limit, direction=direction)
    content: str = own.to_str()
    return content


def _folder(fingerprint: str, precision: str) -> Path:
    return kept_file("ready", _key(fingerprint, precision), _RECORD).parent


def _read(folder: Path, tell: bool = True) -> Ready | None:
    """What a folder keeps; None where that is nothing, damaged, or of another format."""
    if not sound_folder(folder, tell):
        return None
    values = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    if values.pop("format") != FORMAT:
        return None
    return Ready(**{**values, "inputs": tuple(values["inputs"])})


def _forward(record: Ready, fingerprint: str, precision: str, checkpoint: Path) -> Requests | None:
    """The compiled model; None where it, or its head, is not kept any more."""
    read = openvino().Core().read_model
    if not is_int8(precision):
        model = kept_file("models", model_key(fingerprint, record.inputs, True))
        return compiled_float(read(model), record.inputs, record.threads) if sound_folder(model.parent) else None
    quantised, head = Quantised.read(checkpoint), kept_file("models", head_key(fingerprint))
    if quantised is None or quantised.precision != precision or not sound_folder(head.parent):
        return None
    try:
        file = checked_files(checkpoint) / MODEL
    except CheckpointError:  # of which whoever loads the encoder tells
        return None
    return compiled_int8(file, quantised.inputs, record.streams, record.threads, read(head))


def _key(fingerprint: str, precision: str) -> tuple[str, ...]:
    """What must be the same for what is kept to be used."""
    versions = (*runtime_versions(), version("transformers"), version("tokenizers"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = (os.environ.get("OMP_NUM_THREADS", ""), os.environ.get("MKL_NUM_THREADS", ""), str(cores))
    return (fingerprint, precision, "ready", *versions, *threads)
