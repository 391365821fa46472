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
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ultrarag.encode import Encoded, Known
from ultrarag.encoder import Cuts
from ultrarag.errors import CheckpointError, IndexStateError, UltraragError, kind_of
from ultrarag.io import end_with_parent, progress_bar, sync_tree, write_json
from ultrarag.retrieve.engines import SCHEMA_FILE, Backend, Schema, create, open_backend, remove
from ultrarag.retrieve.generation import Catalog, Follower, Generation, Layout, Vectors
from ultrarag.retrieve.passages import Store
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Passages encoded between two possible commits.
CHUNK = 512
#: A commit may cost this share of the encoding since the last one.
COMMIT_SHARE = 0.05
#: Writes that came during the build and are left to the parent.
LEFT_OVER = 64
NICENESS = 10


class Build:
    """The building of one generation, from where it stands."""

    def __init__(self, root: Path, generation: Generation, device: str | None, chunk: int = CHUNK) -> None:
        self.layout, self.generation, self.chunk = Layout(root), generation, chunk
        self.cuts = Cuts()
        self.store = Store.open(root, read_only=True)
        self.directory = self.layout.building(generation.id)
        self.encoder = load_encoder(self.directory, generation, device)
        self.backend = self._vectors()
        self.ahead = Encoded(root, generation.fingerprint, generation.heads, generation.precision)
        self._known = Known()
        self.state = read_progress(self.directory) or {
            "row": 0,
            "encoded": 0,
            "applied": generation.base_seq,
            "seconds": 0.0,
        }
        # a build on Ray notes all that is encoded, and apart from it what is up to `row`
        self.state["encoded"] = self.state.pop("up_to_row", self.state["encoded"])

    def run(self, progress: bool | None = None) -> None:
        """Encode, catch up with the writes made meanwhile, optimise, and make the directory final."""
        if not self.state.get("finished"):
            self._fill(progress)
            self._catch_up()
            self.backend.optimize()
            self._commit(finished=True)
            self.cuts.tell()
        self.backend.close()
        self.store.close()
        sync_tree(self.directory)
        os.rename(self.directory, self.layout.final(self.generation.id))
        self.ahead.remove()

    def _fill(self, progress: bool | None) -> None:
        """Encode all passages written before the build began."""
        base = self.generation.base_seq
        vectors = Vectors(self.backend, self._encode)
        started = committed = time.monotonic()
        spent = float(self.state["seconds"])
        with progress_bar(self._total(), f"build generation {self.generation.id}", "passage", progress) as bar:
            bar.update(self.state["encoded"])
            cost = 0.0
            while chunk := self.store.scan(self.state["row"], self.chunk, base):
                self._known = self.ahead.known([row for row, _ in chunk])
                vectors.put([passage for _, passage in chunk])
                self.state["row"], self.state["encoded"] = chunk[-1][0], self.state["encoded"] + len(chunk)
                self.state["seconds"] = spent + time.monotonic() - started
                bar.update(len(chunk))
                if cost <= COMMIT_SHARE * (time.monotonic() - committed):
                    begun = time.monotonic()
                    self._commit()
                    committed = time.monotonic()
                    cost = committed - begun

    def _catch_up(self) -> None:
        """Apply the writes made meanwhile, until few are left."""
        follower = Follower(self.store, Vectors(self.backend, self._encode), self.state["applied"], lambda seq: None)
        while self.store.last_seq() - follower.applied > LEFT_OVER:
            follower.catch_up(self.store.last_seq())
        self.backend.flush()
        self.state["applied"] = follower.applied

    def _commit(self, finished: bool = False) -> None:
        """Make the vectors durable, then the note of how far they go."""
        self.backend.flush()
        write_json(self.layout.progress(self.directory), {**self.state, "total": self._total(), "finished": finished})

    def _total(self) -> int:
        return max(self.store.count(), self.state["encoded"])

    def _encode(self, texts: Any) -> Embeddings:
        return self._known.fill(list(texts), self._encode_now)

    def _encode_now(self, texts: Any) -> Embeddings:
        return self.encoder.encode(list(texts), "passage", heads=self.generation.heads, progress=False, cuts=self.cuts)

    def _vectors(self) -> Backend:
        """Open what an earlier start left, or begin anew where it had not committed anything."""
        directory = self.layout.vectors(self.directory)
        if read_progress(self.directory) is None:
            remove(directory)
        if not (directory / SCHEMA_FILE).exists():
            return create_vectors(self.encoder, self.generation, directory)
        return open_backend(directory, self.generation.fingerprint)


def create_vectors(encoder: Encoder, generation: Generation, directory: Path) -> Backend:
    """Create the empty vector engine of a generation."""
    probe = encoder.encode(["dimension"], "passage", heads=generation.heads, progress=False)
    return create(directory, Schema.of(probe, generation.fingerprint), generation.backend)


def load_encoder(directory: Path, generation: Generation, device: str | None = None) -> Encoder:
    """Load a generation's own copy of its encoder; CheckpointError when it is not the one it was."""
    from ultrarag.encoder import Encoder

    folder = Layout.checkpoint(directory)
    encoder = Encoder.load(folder, device=device, precision=generation.precision)
    if encoder.fingerprint != generation.fingerprint:
        raise CheckpointError(
            f"{folder} is not the encoder of generation {generation.id} any more (fingerprint "
            f"{encoder.fingerprint[:12]} instead of {generation.fingerprint[:12]}): restore the folder from a copy, or "
            f"build a new generation"
        )
    return encoder


def read_progress(directory: Path) -> dict[str, Any] | None:
    """How far a build has come, or None before its first commit."""
    path = Layout.progress(directory)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise IndexStateError(f"'{path}' is damaged ({error}); delete '{directory}' and build again") from error
    return found


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
        store = Store.open(asked.index, read_only=True)
        generation = Catalog(store).get(asked.generation)
        store.close()
        _build(asked, generation).run(wanted)
    except (UltraragError, OSError) as error:
        print(json.dumps({"kind": kind_of(error), "message": str(error)}))
        return 1
    return 0


def _build(asked: argparse.Namespace, generation: Generation) -> Build:
    if asked.ray is None:
        return Build(asked.index, generation, asked.device, asked.chunk)
    from ultrarag.encode.ray import RayBuild, RayJob

    return RayBuild(asked.index, generation, asked.device, RayJob.from_json(asked.ray))


def _behave(threads: int) -> None:
    """Low priority, few threads, a clean end on SIGTERM, and an end with the parent."""
    signal.signal(signal.SIGTERM, _stop)
    end_with_parent()
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    import torch

    torch.set_num_threads(threads)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
