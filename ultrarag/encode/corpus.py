"""Encoding a corpus of any size to disk: one process per device, each resumable, and reading it back.

A folder holds `encoding.json` (whose vectors, of what), `ids.txt` (a JSON string per line) and a shard per process with
its rows in order. A row's place is its passage's line.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encode.compress import Compression
from ultrarag.errors import DataError, FingerprintError, UsageError
from ultrarag.io import Column, Vectors, only, progress_bar, write_json
from ultrarag.retrieve.passages import PassageFile, passage_file
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

INFO, IDS, SCALES = "encoding.json", "ids.txt", "scale.bin"
#: Passages encoded between two commits: what a kill may lose.
WINDOW = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelChoice:
    """The model that encodes, as every process loads it."""

    path: str
    adapter: str | None = None
    precision: str = "fp32"
    passage_max_length: int | None = None
    batch_tokens: int | None = None

    def load(self, device: str | None) -> Encoder:
        """Load it onto a device."""
        from ultrarag.encoder import Encoder

        return Encoder.load(
            self.path,
            self.adapter,
            device=device,
            precision=self.precision,
            passage_max_length=self.passage_max_length,
        )


def encode_corpus(
    model: ModelChoice,
    corpus: str | Path,
    output: str | Path,
    *,
    heads: Sequence[str] | None = None,
    compression: Compression | None = None,
    devices: Sequence[str | None] = (None,),
    overwrite: bool = False,
    progress: bool | None = None,
) -> EncodedCorpus:
    """Encode all passages of a file or BEIR folder into a folder; a rerun goes on where a killed one stopped.

    Args:
        heads: default: all that the model has.
        compression: of the dense vectors; default: float32.
        devices: one process for each, such as ("cuda:0", "cuda:1"); the same name may come twice.
        overwrite: replace a folder that another model, corpus or format made.

    Raises:
        DataError: rows that are no passages (file:line), or a folder that holds something else.
        FingerprintError: the folder's vectors are another model's.
    """
    folder, compression = Path(output), compression or Compression()
    encoder = model.load(devices[0])
    chosen = tuple(heads) if heads else encoder.heads
    unknown = [head for head in chosen if head not in encoder.heads]
    if unknown:
        raise UsageError(f"the model has no head '{unknown[0]}' (it has {', '.join(encoder.heads)})")
    with passage_file(corpus) as passages:
        if passages.blank:
            log.warning("%d blank passages of '%s' are left out", passages.blank, passages.name)
        info = _info(encoder, passages, chosen, compression, len(devices))
        _prepare(folder, info, passages, overwrite)
        if len(devices) == 1:
            encode_shard(encoder, folder, 0, passages, model.batch_tokens, progress)
        else:
            del encoder
            _run_workers(model, folder, passages.path, devices, progress)
    write_json(folder / INFO, {**info, "finished": True})
    return EncodedCorpus(folder)


def _info(
    encoder: Encoder, passages: PassageFile, heads: Sequence[str], compression: Compression, shards: int
) -> dict[str, Any]:
    ends = [passages.count * (number + 1) // shards for number in range(shards)]
    starts = [0, *ends[:-1]]
    return {
        "fingerprint": encoder.fingerprint,
        "corpus": {"bytes": os.path.getsize(passages.path), "passages": passages.count},
        "heads": list(heads),
        "dim": compression.truncate_dim or encoder.dim if "dense" in heads else None,
        "compression": asdict(compression),
        "shards": [list(span) for span in zip(starts, ends, strict=True)],
        "finished": False,
    }


def _prepare(folder: Path, info: dict[str, Any], passages: PassageFile, overwrite: bool) -> None:
    """Make the folder, or check that it holds the same work."""
    import shutil

    found = folder / INFO
    if found.is_file() and not overwrite:
        before = json.loads(found.read_text(encoding="utf-8"))
        different = [name for name in info if name != "finished" and before.get(name) != info[name]]
        if "fingerprint" in different:
            raise FingerprintError(f"'{folder}' holds vectors of another model; name another folder, or --overwrite")
        if different:
            raise DataError(
                f"'{folder}' was begun with another {different[0]} ({before.get(different[0])}, now "
                f"{info[different[0]]}); name another folder, or give --overwrite"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite or not found.is_file():
            raise DataError(f"'{folder}' is not empty and holds no encoding; name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / IDS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(passage.id, ensure_ascii=False) + "\n" for passage in passages)
        file.flush()
        os.fsync(file.fileno())
    write_json(found, info)


def encode_shard(
    encoder: Encoder,
    folder: Path,
    number: int,
    passages: PassageFile,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Encode one shard's rows, from where it stands; each window is committed."""
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    start, stop = info["shards"][number]
    with Shard(folder, info, number) as shard, progress_bar(stop - start, "encode", "passage", progress) as bar:
        bar.update(shard.rows)
        texts = (passage.content for passage in islice(passages, start + shard.rows, stop))
        options: dict[str, Any] = {"heads": info["heads"], "batch_tokens": batch_tokens, "on_batch": bar.update}
        for window in encoder.iter_encode(texts, "passage", window=WINDOW, **options):
            shard.append(window)
            shard.commit()


class Shard:
    """The vectors of neighbouring rows, in files."""

    def __init__(self, folder: Path, info: dict[str, Any], number: int) -> None:
        self.folder = folder / f"shard-{number:05d}"
        self.folder.mkdir(exist_ok=True)
        self.compression, self.dim = Compression(**info["compression"]), info["dim"]
        dtype = {"binary": "uint8"}.get(self.compression.format, self.compression.format)
        others = [head for head in info["heads"] if head != "dense"]
        self._dense = Vectors(self._sub("dense"), ["dense"], dtype) if "dense" in info["heads"] else None
        self._others = Vectors(self._sub("others"), others) if others else None
        self._scale = Column(self.folder / SCALES, "<f4")
        parts = [part for part in (self._dense, self._others) if part is not None]
        #: what all files hold durably
        self.rows = min(part.rows for part in parts)
        for part in parts:
            part.cut(self.rows)
        self._scale.cut(self.rows if self._dense else 0)

    def _sub(self, name: str) -> Path:
        (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *exception: object) -> None:
        for part in (self._dense, self._others, self._scale):
            if part is not None:
                part.close()

    def append(self, embeddings: Embeddings) -> None:
        """Add the next rows."""
        if self._dense is not None:
            codes, scale = self.compression.encode(embeddings.dense)
            self._dense.append(Embeddings(dense=codes))
            self._scale.append(scale[:, None])
        if self._others is not None:
            self._others.append(only(embeddings, self._others.heads))

    def commit(self) -> None:
        """Make the rows durable."""
        self._scale.sync()
        for part in (self._dense, self._others):
            if part is not None:
                part.commit()
                self.rows = part.rows

    def read(self, start: int, stop: int) -> Embeddings:
        """Rows start to stop; dense vectors as float32."""
        found = self._others.read(start, stop) if self._others else Embeddings()
        if self._dense is not None:
            codes, scale = self._dense.codes(start, stop), self._scale.read(start, stop).reshape(-1)
            found.dense = self.compression.decode(codes, scale, self.dim)
        return found


class EncodedCorpus:
    """What `encode_corpus` wrote: passages' ids and vectors, read a block at a time.

    Example:
        >>> for ids, vectors in EncodedCorpus("encoded").blocks():
        ...     vectors.dense.shape
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a finished folder; DataError when it is none."""
        self.folder = Path(folder)
        try:
            self.info: dict[str, Any] = json.loads((self.folder / INFO).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"'{self.folder}' holds no encoding ({error})") from error
        if not self.info["finished"]:
            raise DataError(f"'{self.folder}' is not finished: run the same `ultrarag data encode` again to go on")

    def __len__(self) -> int:
        return int(self.info["corpus"]["passages"])

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        return str(self.info["fingerprint"])

    def ids(self) -> Iterator[str]:
        """The passages' ids, in their order."""
        with open(self.folder / IDS, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file)

    def blocks(self, size: int = WINDOW) -> Iterator[tuple[list[str], Embeddings]]:
        """Yield ids and vectors of `size` passages at a time."""
        ids = self.ids()
        for number, (start, stop) in enumerate(self.info["shards"]):
            with Shard(self.folder, self.info, number) as shard:
                for first in range(0, stop - start, size):
                    last = min(first + size, stop - start)
                    yield list(islice(ids, last - first)), shard.read(first, last)

    def dense(self) -> np.ndarray:
        """All dense vectors, (passages, dim) float32, in memory."""
        return np.concatenate([vectors.dense for _, vectors in self.blocks()])


def _run_workers(
    model: ModelChoice, folder: Path, corpus: str, devices: Sequence[str | None], progress: bool | None
) -> None:
    """One process per device; when one fails the others are ended, and what is committed stays."""
    children = [_start(model, folder, corpus, number, device) for number, device in enumerate(devices)]
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    try:
        with progress_bar(info["corpus"]["passages"], "encode", "passage", progress) as bar:
            while any(child.poll() is None for child in children):
                _check(children, devices)
                bar.update(_committed(folder, len(devices)) - bar.n)
                time.sleep(0.2)
        _check(children, devices)
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()


def _start(model: ModelChoice, folder: Path, corpus: str, number: int, device: str | None) -> subprocess.Popen[bytes]:
    asked = {"model": asdict(model), "folder": str(folder), "corpus": corpus, "shard": number, "device": device}
    paths = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, "-m", "ultrarag.encode.worker", json.dumps(asked)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)


def _check(children: Sequence[subprocess.Popen[bytes]], devices: Sequence[str | None]) -> None:
    for child, device in zip(children, devices, strict=True):
        if child.poll():
            raise DataError(
                f"encoding on {device or 'the default device'} ended with status {child.returncode} (its message is "
                "above); what is committed stays: the same command goes on"
            )


def _committed(folder: Path, shards: int) -> int:
    """Rows that all shards hold so far."""
    found = 0
    for number in range(shards):
        for part in ("dense", "others"):
            state = folder / f"shard-{number:05d}" / part / "vectors.json"
            if state.is_file():
                found += int(json.loads(state.read_text(encoding="utf-8"))["rows"])
                break
    return found
