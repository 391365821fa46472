"""A corpus of any size encoded into a folder by one process per device; a rerun goes on where a killed one stopped.

`python -m ultrarag.encode.processes JSON` is such a process: it encodes one shard, the passages of neighbouring lines.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.encode.blocks import CHUNK_TEXTS, encode_rest, same_work
from ultrarag.encode.corpus import IDS, INFO, Compression, EncodedCorpus, Shard, committed_rows
from ultrarag.encode.vectors import KEYS, write_keys
from ultrarag.encoder.engines import is_int8
from ultrarag.errors import DataError, UsageError
from ultrarag.io import named_conditions, progress_bar, run_command, sha256_of, start_child, write_json
from ultrarag.retrieve.passages import PassageFile, passage_file

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelChoice:
    """The model that encodes, as every process loads it."""

    path: str
    adapter: str | None = None
    precision: str = "fp32"
    passage_max_length: int | None = None
    batch_tokens: int | None = None
    #: run Python code that comes with the model
    trust_remote_code: bool = False

    def load(self, device: str | None) -> Encoder:
        """Load it onto a device."""
        from ultrarag.encoder import Encoder

        return Encoder.load(
            self.path,
            self.adapter,
            device=device,
            precision=self.precision,
            trust_remote_code=self.trust_remote_code,
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
        ResourceError: there is no room, or the folder cannot be written; the same call goes on later.
    """
    folder, compression = Path(output), compression or Compression()
    encoder = model.load(devices[0])
    if encoder.adapter.declared.pair_input:
        raise UsageError(
            f"'{model.path}' ({encoder.adapter.name}) is a reranker, which scores pairs and gives no vectors: name an "
            "embedding model"
        )
    chosen = tuple(heads) if heads else encoder.heads
    unknown = [head for head in chosen if head not in encoder.heads]
    if unknown:
        raise UsageError(f"the model has no head '{unknown[0]}' (it has {', '.join(encoder.heads)})")
    with named_conditions(folder), passage_file(corpus) as passages:
        if passages.blank:
            log.warning("%d blank passages of '%s' are left out", passages.blank, passages.name)
        info = _info(encoder, passages, chosen, compression, len(devices))
        _prepare(folder, info, passages, overwrite)
        if len(devices) == 1:
            encode_shard(encoder, folder, 0, passages, CHUNK_TEXTS, model.batch_tokens, progress)
        else:
            chosen_once = replace(model, adapter=encoder.adapter.name)
            del encoder
            _run_processes(chosen_once, folder, info, passages.path, devices, progress)
    write_json(folder / INFO, {**info, "finished": True})
    return EncodedCorpus(folder)


def _info(
    encoder: Encoder, passages: PassageFile, heads: Sequence[str], compression: Compression, shards: int
) -> dict[str, Any]:
    ends = [passages.count * (number + 1) // shards for number in range(shards)]
    size, digest = os.path.getsize(passages.path), sha256_of(Path(passages.path))
    return {
        "fingerprint": encoder.passage_fingerprint,
        **({"precision": encoder.precision} if is_int8(encoder.precision) else {}),
        "corpus": {"bytes": size, "passages": passages.count, "sha256": digest},
        "heads": list(heads),
        "dim": compression.truncate_dim or encoder.dim if "dense" in heads else None,
        "compression": asdict(compression),
        "shards": [list(span) for span in zip([0, *ends], ends, strict=False)],
    }


def _prepare(folder: Path, info: dict[str, Any], passages: PassageFile, overwrite: bool) -> None:
    """Make the folder, or check that it holds the same work."""
    if overwrite and (folder / INFO).is_file():
        _remove(folder)
    if same_work(folder / INFO, info, "name another folder, or give --overwrite"):
        return
    if folder.is_dir() and any(path.name not in (IDS, KEYS) for path in folder.iterdir()):
        raise DataError(f"'{folder}' is not empty and holds no encoding; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / IDS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(passage.id, ensure_ascii=False) + "\n" for passage in passages)
        file.flush()
        os.fsync(file.fileno())
    write_keys(folder / KEYS, passages)
    write_json(folder / INFO, {**info, "finished": False})


def _remove(folder: Path) -> None:
    """Remove an encoding; of what a kill leaves the same command makes a new one, for it still says what it is."""
    for shard in folder.glob("shard-*"):
        shutil.rmtree(shard)
    (folder / INFO).unlink()
    shutil.rmtree(folder)


def encode_shard(
    encoder: Encoder,
    folder: Path,
    number: int,
    passages: PassageFile,
    chunk_texts: int,
    batch_tokens: int | None = None,
    progress: bool | None = None,
) -> None:
    """Encode one shard's rows, from where it stands."""
    info = json.loads((folder / INFO).read_text(encoding="utf-8"))
    start, stop = info["shards"][number]
    options: dict[str, Any] = {"heads": info["heads"], "batch_tokens": batch_tokens, "progress": progress}
    with Shard(folder, info, number) as shard:
        texts = (passage.encodable for passage in islice(passages, start + shard.rows, stop))
        encode_rest(encoder, shard, texts, stop - start, chunk_texts, **options)


def _run_processes(
    model: ModelChoice,
    folder: Path,
    info: dict[str, Any],
    corpus: str,
    devices: Sequence[str | None],
    progress: bool | None,
) -> None:
    """One process per device; when one fails the others are ended, and what is committed stays."""
    children = [_start(model, folder, corpus, number, device) for number, device in enumerate(devices)]
    try:
        with progress_bar(info["corpus"]["passages"], "encode", "text", progress) as bar:
            while any(child.poll() is None for child in children):
                _check(children, devices)
                bar.update(committed_rows(folder, info["heads"]) - bar.n)
                time.sleep(0.2)
        _check(children, devices)
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()


def _start(model: ModelChoice, folder: Path, corpus: str, number: int, device: str | None) -> subprocess.Popen[bytes]:
    asked: dict[str, Any] = {"model": asdict(model), "device": device, "folder": str(folder), "shard": number}
    asked |= {"corpus": corpus, "chunk_texts": CHUNK_TEXTS}
    return start_child("ultrarag.encode.processes", json.dumps(asked))


def _check(children: Sequence[subprocess.Popen[bytes]], devices: Sequence[str | None]) -> None:
    for child, device in zip(children, devices, strict=True):
        if child.poll():
            raise DataError(
                f"encoding on {device or 'the default device'} ended with status {child.returncode} (its message is "
                "above); what is committed stays: the same command goes on"
            )


def main() -> int:
    """Encode one shard on one device; errors go to stderr."""
    return run_command(lambda: _encode(json.loads(sys.argv[1])))


def _encode(asked: dict[str, Any]) -> None:
    model = ModelChoice(**asked["model"])
    encoder, folder = model.load(asked["device"]), Path(asked["folder"])
    with passage_file(asked["corpus"]) as passages:
        encode_shard(encoder, folder, asked["shard"], passages, asked["chunk_texts"], model.batch_tokens, False)


if __name__ == "__main__":
    sys.exit(main())
