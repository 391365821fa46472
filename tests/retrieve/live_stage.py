"""The stage of the live machine: the product's code with pauses, small portions, and a stand-in for the encoder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.retrieve import stand_in
from tests.retrieve.interleave import Interleaving
from tests.retrieve.live_machine import LiveMachine
from tests.retrieve.stand_in import StandIn
from ultrarag.encode import ranks
from ultrarag.retrieve import swap as swapping
from ultrarag.retrieve.build import child as builder
from ultrarag.retrieve.build import start
from ultrarag.retrieve.build.child import Build, EncodeHere
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines.numpy_engine import NumpyBackend
from ultrarag.retrieve.generation import open as opening
from ultrarag.retrieve.generation import replay as followers
from ultrarag.retrieve.generation import source
from ultrarag.retrieve.generation.catalog import Catalog
from ultrarag.retrieve.generation.replay import GenerationVectors
from ultrarag.retrieve.generation.serving import Serving
from ultrarag.retrieve.generation.source import Draft
from ultrarag.retrieve.live import LiveIndex
from ultrarag.retrieve.passages.database import Database
from ultrarag.retrieve.passages.store import Store


@contextlib.contextmanager
def machine(folder: Path) -> Iterator[tuple[type[LiveMachine], pytest.MonkeyPatch]]:
    """The machine over an empty index in a folder, with pauses in the product's code."""
    turns = Interleaving()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)  # a killed process loses nothing that it wrote
        _stand_in(patch)
        _small(patch)
        LiveIndex.create(folder / "kb", StandIn(0), backend="numpy", bm25=False).close()  # type: ignore[arg-type]
        found = type("Machine", (LiveMachine,), {"template": folder / "kb", "turns": turns})
        _pauses(patch, turns)
        _record(patch, found)
        yield found, patch


def _stand_in(patch: pytest.MonkeyPatch) -> None:
    for module in (opening, start):
        patch.setattr(module, "prepare", stand_in.prepare)
    for module in (opening, builder):
        patch.setattr(module, "load_encoder", stand_in.load_encoder)
    patch.setattr("ultrarag.encoder.read_passage_maps", stand_in.read_passage_maps)
    connect = Database._connect

    def quick(self: Database) -> Any:
        db = connect(self)
        db.execute("PRAGMA synchronous=OFF")
        return db

    patch.setattr(Database, "_connect", quick)


def _small(patch: pytest.MonkeyPatch) -> None:
    """Everything that is done in portions is done in several."""
    patch.setattr(followers, "CHUNK_CHANGES", 2)
    patch.setattr(followers, "FLUSH_FROM", 2)
    patch.setattr(swapping, "FEW", 1)
    patch.setattr(ranks, "CHUNK_TEXTS", 2)
    patch.setattr(builder, "LEFT_OVER", 1)
    patch.setattr(builder, "COMMIT_SHARE", float("inf"))


def _pauses(patch: pytest.MonkeyPatch, turns: Interleaving) -> None:
    points = [
        *turns.points(Store, "changes", "scan", "last_seq", "forget"),
        *turns.points(Catalog, "add", "flip", "set_state", "set_applied"),
        *turns.points(Core, "replace", "load"),
        *turns.points(GenerationVectors, "put", "put_metadata", "delete", "flush"),
        *turns.points(NumpyBackend, "search_dense"),
        *turns.points(Serving, "encode_queries", "encode_passages"),
        *turns.points(Draft, "commit"),
        *turns.points(source, "sync_tree"),
        *turns.points(swapping, "check_count", "check_sound", "check_sharing"),
    ]
    for owner, name, function in points:
        patch.setattr(owner, name, function)
    retire = Serving.retire

    def retiring(self: Serving) -> None:
        self._retiring = True
        turns.pause("retire", lambda: self._users == 0)
        retire(self)

    patch.setattr(Serving, "retire", retiring)
    patch.setattr(start, "run_builder", _build)


def _build(root: Path, generation: Any, **options: Any) -> None:
    """The builder's code in this process, which lets go of its files as the end of its own would."""
    build = Build(root, generation, None, EncodeHere(chunk=2))
    try:
        build.run(False)
    except BaseException:
        build.draft.backend._lock.release()  # type: ignore[attr-defined]
        build.draft.store.close()
        raise


def _record(patch: pytest.MonkeyPatch, found: type[LiveMachine]) -> None:
    """Tell the machine of every write at the moment at which the store has it."""
    write, delete = Store.write, Store.delete

    def writing(self: Store, records: Any, *policy: Any) -> Any:
        records = list(records)
        result = write(self, records, *policy)
        found.current.committed({record.id: record.text for record in records})
        found.turns.pause("after write")
        return result

    def deleting(self: Store, ids: Any) -> Any:
        ids = list(ids)
        result = delete(self, ids)
        found.current.committed(dict.fromkeys(ids))
        found.turns.pause("after delete")
        return result

    patch.setattr(Store, "write", writing)
    patch.setattr(Store, "delete", deleting)
