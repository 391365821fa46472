"""`python -m ultrarag.retrieve.build.child INDEX GENERATION`: encode the corpus into a new generation.

A process of its own at low priority, so that neither the interpreter lock nor the memory of the process that answers
searches suffers. It reads the passages from the store (which it never writes to), commits the vectors chunk by chunk,
and goes on after the last committed chunk when it is started again. It ends with its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from ultrarag.encode import Encoded, Known
from ultrarag.errors import UltraragError, kind_of
from ultrarag.io import named_conditions, progress_bar
from ultrarag.retrieve.bridge import KeptAhead
from ultrarag.retrieve.generation import (
    Catalog,
    Draft,
    Follower,
    Generation,
    IndexLayout,
    encoded_of,
    load_encoder,
    quantise_own,
)
from ultrarag.retrieve.passages import Store
from ultrarag.types import Embeddings, Passage

#: Passages encoded between two possible commits.
CHUNK = 512
#: A commit may cost this share of the encoding since the last one.
COMMIT_SHARE = 0.05
#: Writes that came during the build and are left to the parent.
LEFT_OVER = 64

Encode = Callable[[Sequence[str | Passage]], Embeddings]


class Strategy(Protocol):
    """A way to give vectors to all passages that were written before a build began."""

    def fill(self, draft: Draft, encode: Encode, progress: bool | None) -> None:
        """Encode what the draft lacks, and commit; whatever a kill leaves is taken up by the next start.

        Args:
            encode: encodes passages in this process.
            progress: a bar on stderr; None: on a terminal.
        """
        ...


class EncodeHere:
    """Encode in this process, chunk by chunk; what ranks of torchrun, or a bridge, made ahead is taken as it is."""

    def __init__(self, chunk: int = CHUNK) -> None:
        """`chunk`: passages between two possible commits."""
        self.chunk = chunk

    def fill(self, draft: Draft, encode: Encode, progress: bool | None) -> None:
        """See `Strategy.fill`."""
        done, ahead, pace = draft.progress, encoded_ahead(draft), _Pace(draft)
        done.ahead, done.own = 0, {}  # what Ray has beyond `row` is encoded again
        kept = KeptAhead.of(draft.layout.root, draft.generation)
        kept.fill(draft.store, encode, progress)
        started, spent = time.monotonic(), done.seconds
        with progress_bar(draft.total(), f"build generation {draft.generation.id}", "passage", progress) as bar:
            bar.update(done.encoded)
            while chunk := draft.store.scan(done.row, self.chunk, draft.generation.base_seq):
                rows, passages = zip(*chunk, strict=True)
                _put(draft, passages, ahead.known(rows), partial(kept.known(passages).fill, encode=encode))
                done.row, done.encoded = rows[-1], done.encoded + len(rows)
                done.seconds = spent + time.monotonic() - started
                bar.update(len(rows))
                pace.commit()
        kept.close()


def _put(draft: Draft, passages: Sequence[Passage], known: Known, encode: Encode) -> None:
    draft.vectors(lambda texts: known.fill(texts, encode)).put(passages)


class _Pace:
    """Commits a draft as often as it costs little beside the encoding."""

    def __init__(self, draft: Draft) -> None:
        self._draft, self._committed, self._cost = draft, time.monotonic(), 0.0

    def commit(self) -> None:
        """Commit, unless the last commit was too dear for the time since then."""
        began = time.monotonic()
        if self._cost > COMMIT_SHARE * (began - self._committed):
            return
        self._draft.commit()
        self._committed = time.monotonic()
        self._cost = self._committed - began


def encoded_ahead(draft: Draft) -> Encoded:
    """What ranks have encoded, or will, or the parent has mapped, for a draft."""
    return encoded_of(draft.layout.root, draft.generation)


class Build:
    """The building of one generation, from where it stands."""

    def __init__(
        self, root: Path, generation: Generation, device: str | None, strategy: Strategy | None = None
    ) -> None:
        """Load the encoder and open the draft; default strategy: `EncodeHere`."""
        self.strategy: Strategy = strategy or EncodeHere()
        directory = IndexLayout(root).building(generation.id)
        quantise_own(directory, generation)
        self.encoder = load_encoder(directory, generation, device)
        self.draft = Draft(root, generation, self.encoder)

    def run(self, progress: bool | None = None) -> None:
        """Encode, catch up with the writes made meanwhile, optimise, and make the directory final."""
        draft = self.draft
        if not draft.progress.finished:
            self.strategy.fill(draft, self.encode, progress)
            self.catch_up()
            draft.backend.optimize()
            draft.commit(finished=True)
            draft.cuts.tell()
        draft.publish()
        encoded_ahead(draft).remove()  # whichever strategy built it, nobody needs the blocks any more

    def catch_up(self) -> None:
        """Apply the writes made meanwhile, until few are left, or they come as fast as this process encodes.

        The swap applies the rest, for which writers wait in the end. Here nobody waits, and beside busy searches four
        passages a second were written and one encoded: no build ended.
        """
        draft, vectors = self.draft, self.draft.vectors(self.encode)
        follower = Follower(draft.store, vectors, draft.progress.applied, lambda seq: None)
        before = None
        while (behind := draft.store.last_seq() - follower.applied) > LEFT_OVER:
            if before is not None and behind > before / 2:
                break
            before = behind
            follower.catch_up(draft.store.last_seq())
        draft.backend.flush()
        draft.progress.applied = follower.applied

    def encode(self, texts: Sequence[str | Passage]) -> Embeddings:
        """Encode passages with the heads that the generation stores."""
        heads, cuts = self.draft.generation.heads, self.draft.cuts
        return self.encoder.encode(list(texts), "passage", heads=heads, progress=False, cuts=cuts)


def main(arguments: list[str] | None = None) -> int:
    """Run one build; an error goes to stdout as JSON, for the parent to raise."""
    parser = argparse.ArgumentParser(prog="python -m ultrarag.retrieve.build.child", description=__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("generation", type=int)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--progress", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--ray", metavar="JOB", help="JSON of a RayJob")
    asked = parser.parse_args(arguments)
    _behave(asked.threads)
    wanted = {"auto": None, "always": True, "never": False}[asked.progress]
    try:
        with named_conditions(asked.index):
            store = Store.open(asked.index, read_only=True)
            generation = Catalog(store).get(asked.generation)
            store.close()
            Build(asked.index, generation, asked.device, _strategy(asked)).run(wanted)
    except (UltraragError, OSError) as error:
        print(json.dumps({"kind": kind_of(error), "message": str(error)}))
        return 1
    return 0


def _strategy(asked: argparse.Namespace) -> Strategy:
    if asked.ray is None:
        return EncodeHere(asked.chunk)
    from ultrarag.encode.ray import EncodeOnRay, RayJob

    return EncodeOnRay(RayJob.from_json(asked.ray))


def _behave(threads: int) -> None:
    """Few threads, and a clean end on SIGTERM."""
    signal.signal(signal.SIGTERM, _stop)
    import torch

    torch.set_num_threads(threads)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
