"""The stored vectors of a live index for whoever trains against them: in memory, or in a folder mapped from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path

from ultrarag.encode import CHUNK_TEXTS, IDS, INFO, KEYS, Compression, CorpusVectors, Shard, passage_keys
from ultrarag.errors import UsageError, did_you_mean
from ultrarag.io import only, publish_directory, staged_directory, write_json
from ultrarag.retrieve.core import Core
from ultrarag.types import HEADS, Embeddings, Passage


def corpus_vectors(core: Core, folder: Path | None, heads: Sequence[str] | None) -> CorpusVectors:
    """Read what the live generation stores; see `LiveIndex.corpus_vectors`."""
    live = core.live.generation
    for head in heads or ():
        if head not in live.heads:
            raise UsageError(
                f"the index stores no head '{head}'{did_you_mean(head, live.heads)}: {', '.join(live.heads)}"
            )
    chosen = tuple(head for head in HEADS if head in (heads or live.heads))
    with nullcontext() if core.reading else core.leading():
        if not core.reading:
            core.settle()
        if folder is None:
            return _in_memory(core, chosen)
        with staged_directory(folder) as stage:
            _write(core, chosen, stage)
            publish_directory(stage, folder)
    return CorpusVectors.open(folder)


def _blocks(core: Core, heads: tuple[str, ...]) -> Iterator[tuple[list[Passage], Embeddings]]:
    """Passages that have vectors, and these, some thousands at a time; writes go on in between."""
    vectors_of, row = core.live.generation.vectors_of, 0
    while row < core.store.last_row():
        passages, held = core.stored(row, row + CHUNK_TEXTS, vectors_of, heads)
        row += CHUNK_TEXTS
        if held is not None:
            yield passages, held


def _in_memory(core: Core, heads: tuple[str, ...]) -> CorpusVectors:
    found = list(_blocks(core, heads))
    passages = [passage for part, _ in found for passage in part]
    vectors = Embeddings.cat([held for _, held in found]) if found else Embeddings()
    return CorpusVectors(
        core.live.generation.passage_fingerprint,
        [passage.id for passage in passages],
        passage_keys(passages),
        vectors.dense,
        others=lambda rows, asked: only(vectors[rows], asked),
        heads=heads,
    )


def _write(core: Core, heads: tuple[str, ...], folder: Path) -> None:
    """Write ids, keys and vectors as `ultrarag data encode` does, in one shard."""
    generation = core.live.generation
    info = {
        "fingerprint": generation.passage_fingerprint,
        "heads": list(heads),
        "dim": core.live.backend.schema.dense if "dense" in heads else None,
        "compression": asdict(Compression()),
    }
    rows = 0
    with ExitStack() as files:
        ids = files.enter_context(open(folder / IDS, "w", encoding="utf-8"))
        keys = files.enter_context(open(folder / KEYS, "wb"))
        shard = files.enter_context(Shard(folder, info, 0))
        for passages, held in _blocks(core, heads):
            ids.writelines(json.dumps(passage.id, ensure_ascii=False) + "\n" for passage in passages)
            keys.write(passage_keys(passages).astype("<i8").tobytes())
            shard.append(held)
            shard.commit()
            rows += len(passages)
    corpus = {"passages": rows, "index": str(core.layout.root), "generation": generation.id}
    write_json(folder / INFO, {**info, "corpus": corpus, "shards": [[0, rows]], "finished": True})
