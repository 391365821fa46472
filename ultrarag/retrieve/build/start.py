"""Building a generation, from the side of the process that goes on answering searches: enter it, run the child, finish.

The child (`ultrarag.retrieve.build.child`) does the work; what it committed is there when the same encoder is built
again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag import errors
from ultrarag.encode.ray import RayJob, RayPool
from ultrarag.encoder.engines import is_int8
from ultrarag.errors import IndexStateError, UsageError
from ultrarag.io import NICENESS, OwnerLock, start_child, stop_child
from ultrarag.quantise import TEXTS, Calibration
from ultrarag.retrieve.bridge import BridgeTerms, cross, drop, read_report
from ultrarag.retrieve.build.origin import map_stored, origin_of
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.engines import is_uri, next_backend, settled, with_quantise
from ultrarag.retrieve.generation import (
    Generation,
    IndexLayout,
    Progress,
    Source,
    Unencoded,
    find_source,
    prepare,
    publish,
    quantise_own,
)

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

logger = logging.getLogger("ultrarag")

#: Seconds to wait for a build to end by itself.
PATIENCE = 20.0


def build_generation(
    core: Core,
    checkpoint: str | os.PathLike[str] | Encoder,
    *,
    adapter: str | None = None,
    backend: str | None = None,
    heads: Sequence[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: bool | None = None,
    ray: RayPool | None = None,
    share: bool | None = None,
    bridge: BridgeTerms | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
) -> Generation:
    """Build, or go on building, a generation of an open index; see `LiveIndex.build`."""
    if not core.building.acquire(blocking=False):
        raise IndexStateError("a build is running already; wait for it to finish")
    try:
        with core.leading():
            live = core.live.generation
            source = find_source(checkpoint, adapter, core.layout, live, trust_remote_code, precision)
            _calibrate(core, source, ray)
            job = None
            if ray:
                job = RayJob.of(ray, checkpoint, source.adapter, backend or live.backend, source.trust_remote_code)
            generation = _prepared(core, source, backend, heads, share)
            if core.serving.generation.id != generation.id:
                drop(core)  # a bridge to a generation that was given up for this one
            if generation.state == "ready":
                return generation
            wanted = bridge if generation.encodes and core.bridge is None else None
            if wanted is not None and not _decided_against(core, generation):
                quantise_own(core.layout.directory(generation.id), generation)
                cross(core, generation, wanted)
            if generation.shares:
                publish(core.layout, generation)
            elif not core.layout.final(generation.id).exists():
                if generation.mapped_from is not None:
                    map_stored(core, generation, progress)
                run_builder(
                    core.layout.root,
                    generation,
                    device=device or core.device,
                    threads=threads,
                    progress=progress,
                    ray=job if generation.encodes else None,
                    started=lambda child: _started(core, child),
                )
            done = finish(core, generation)
            logger.info("%s", done.how_built())
            return done
    finally:
        core.builder = None
        core.building.release()


def _calibrate(core: Core, source: Source, ray: RayPool | None) -> None:
    """Take passages for a source that is to be in int8 and is not quantised; those of an unfinished build again.

    Raises:
        UsageError: it is encoded on Ray, whose workers load the checkpoint as it is; there are no passages.
    """
    if not source.uncalibrated:
        return
    if ray is not None:
        raise UsageError("on Ray, int8 needs a quantised checkpoint: ultrarag checkpoint quantise")
    files = [core.layout.calibration(core.layout.directory(found.id)) for found in _unfinished(core, source)]
    kept = [Calibration.kept(file) for file in files if file.is_file()]
    source.calibrate(kept[-1] if kept else _calibration(core))


def _unfinished(core: Core, source: Source) -> list[Generation]:
    """What an earlier start of this build in int8 has left, or finished."""
    found = [*core.catalog.in_state("building"), *core.catalog.in_state("ready")]
    return [item for item in found if item.fingerprint == source.fingerprint and is_int8(item.precision)]


def _calibration(core: Core) -> Calibration:
    passages = core.store.sample(TEXTS, core.store.last_seq())
    return Calibration.of([("passage", passage.content) for passage in passages], "the index's passages")


def _decided_against(core: Core, generation: Generation) -> bool:
    """Whether an earlier start of this build found that no bridge gains."""
    found = read_report(core.layout.directory(generation.id))
    return found is not None and found["mode"] is None


def end_build(core: Core) -> None:
    """End a running build, if there is one; it can be taken up again."""
    if (child := core.builder) is not None:
        end(child)


def _started(core: Core, child: subprocess.Popen[str]) -> None:
    core.builder = child


def _prepared(
    core: Core, source: Source, backend: str | None, heads: Sequence[str] | None, share: bool | None
) -> Generation:
    """The generation, with its directory and checkpoint unless it is ready; a loaded encoder is let go of here."""
    generation = enter(core, source, backend, heads, share)
    if generation.state != "ready":
        prepare(core.layout, generation, source)
    return generation


def enter(
    core: Core, source: Source, backend: str | None, heads: Sequence[str] | None, share: bool | None = None
) -> Generation:
    """Return the unfinished or ready generation of an encoder, or a new one; unfinished ones of others are given up.

    Raises:
        UsageError: no vectors could be shared, and `share` insists.
    """
    if core.link is not None and not _is_in(core.link.uri, backend):
        raise UsageError(
            f"the vectors of a shared index are all in its server, '{core.link.uri}'; leave backend out, or give that "
            f"address with another quantise"
        )
    backend = backend and settled(backend)
    with core.writing:  # else a vacuum could forget the log entries that follow, or remove the vectors to be shared
        origin, chosen = origin_of(core.layout, core.catalog, source, backend, heads, share)
        engine = live = backend or settled(core.live.generation.backend)
        if origin.vectors_of is not None:
            engine = core.catalog.get(origin.vectors_of).backend
        elif backend is None and "dense" in chosen:
            engine = next_backend(live, core.store.count())
        for found in core.catalog.all():
            same = (found.fingerprint, found.heads, found.precision) == (source.fingerprint, chosen, source.precision)
            same = same and found.backend in (engine, live)  # begun when there were fewer passages
            if same and (found.state == "building" or share is not None):
                same = origin.is_of(found)
            if same and found.state in ("building", "ready"):
                return found
            if found.state == "building":
                core.catalog.set_state(found.id, "retired", only_from=("building",))
        wanted = (source.fingerprint, engine, chosen, source.precision)
        return core.catalog.add(*wanted, state="building", base_seq=core.store.last_seq(), origin=origin)


def _is_in(uri: str, backend: str | None) -> bool:
    """Whether an engine is in the server of a shared index, however it keeps vectors; None is the live one's."""
    return backend is None or (is_uri(backend) and with_quantise(backend, "") == uri)


def finish(core: Core, generation: Generation) -> Generation:
    """Enter a built generation as ready, with the writes that its builder applied."""
    done = Progress.read(core.layout.final(generation.id))
    if not generation.shares:
        core.catalog.set_applied(generation.id, done.applied if done else generation.base_seq)
    if done and done.unencoded:
        Unencoded(core.store, generation.id).note(done.unencoded, [])
    if core.link is not None:
        core.link.publish_checkpoint(generation)
    if not core.catalog.set_state(generation.id, "ready", only_from=("building",)):
        raise IndexStateError(f"generation {generation.id} was discarded while it was built; build it again")
    return core.catalog.get(generation.id)


def run_builder(
    root: Path,
    generation: Generation,
    *,
    device: str | None = None,
    threads: int | None = None,
    progress: bool | None = None,
    ray: RayJob | None = None,
    started: Callable[[subprocess.Popen[str]], None] = lambda child: None,
) -> None:
    """Run the builder process to its end; on Ctrl-C it is ended, and can be taken up again later.

    The builder inherits a lock on the directory that it writes to: one whose parent was killed while it began is
    waited for, so that never two write there.

    Raises:
        IndexStateError: when such a builder goes on; names its process.
        UltraragError: of the kind that stopped the builder.
    """
    threads = threads or max(1, (os.cpu_count() or 2) // 2)
    wish = {None: "auto", True: "always", False: "never"}[progress]
    words = [str(root), str(generation.id)]
    words += ["--threads", str(threads), "--progress", wish, *(["--device", device] if device else [])]
    words += ["--ray", ray.to_json()] if ray else []
    layout = IndexLayout(root)
    lock = OwnerLock(
        layout.building(generation.id), "a builder whose parent was killed; end that process", patience=PATIENCE
    )
    try:
        if layout.final(generation.id).exists():  # it was built while we waited
            return
        _run(lock, generation, words, threads, started)
    finally:
        lock.release()


def _run(
    lock: OwnerLock,
    generation: Generation,
    words: list[str],
    threads: int,
    started: Callable[[subprocess.Popen[str]], None],
) -> None:
    limits = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "pass_fds": lock.descriptors()}
    with start_child("ultrarag.retrieve.build.child", *words, env=limits, niceness=NICENESS, **pipes) as child:
        lock.name(child.pid)
        started(child)
        try:
            output, _ = child.communicate()
        except BaseException:
            end(child)
            raise
    if child.returncode:
        raise _error(output, child.returncode, generation)


def end(child: subprocess.Popen[str]) -> None:
    """End a builder; what it committed is kept."""
    stop_child(child, PATIENCE)


def _error(output: str, status: int, generation: Generation) -> Exception:
    """The error that the builder printed as JSON, or one that says how it ended."""
    again = "what it committed is kept: build the same checkpoint again to go on"
    try:
        found = json.loads(output.strip().splitlines()[-1])
        kind = getattr(errors, found["kind"])
        return kind(f"building generation {generation.id}: {found['message']}")
    except (ValueError, IndexError, KeyError, AttributeError, TypeError):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return IndexStateError(f"the build of generation {generation.id} {how}; {again}")
