"""Preparing a generation and running its build: the side of the process that goes on answering searches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ultrarag import errors
from ultrarag.checkpoint import MANIFEST, Manifest, changed_files, read_manifest
from ultrarag.errors import CheckpointError, IndexStateError, UsageError, did_you_mean
from ultrarag.io import publish_directory, staged_directory
from ultrarag.retrieve.build import read_progress
from ultrarag.retrieve.generation.catalog import Generation, Layout

if TYPE_CHECKING:
    from ultrarag.encode.ray import RayJob
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve.core import Core

#: The heads that an index can store.
STORED = ("dense", "sparse", "colbert")
#: Seconds that a build may take to end when it is told to.
PATIENCE = 20.0


def stored_heads(available: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The heads to store: those wanted, else all that the encoder has.

    Raises:
        UsageError: when the encoder lacks one, or has none (a cross-encoder).
    """
    known = tuple(head for head in STORED if head in available)
    if not known:
        raise UsageError(f"the encoder has the heads {', '.join(available)}: none that an index can store")
    chosen = known if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for head in chosen:
        if head not in known:
            raise UsageError(f"the encoder has no head '{head}'{did_you_mean(head, known)}; it has {', '.join(known)}")
    if not chosen:
        raise UsageError(f"an index stores at least one head; the encoder has {', '.join(known)}")
    return tuple(head for head in STORED if head in chosen)


class Source:
    """The encoder that a generation is to have: a checkpoint of ours, or one that is loaded."""

    def __init__(
        self, checkpoint: str | os.PathLike[str] | Encoder, adapter: str | None = None, precision: str = "fp32"
    ) -> None:
        """Read a checkpoint's manifest; `precision` is for one that is not loaded."""
        self._folder: Path | None = None
        self._encoder: Encoder | None = None
        self._manifest: Manifest | None = None
        self.precision = precision
        if isinstance(checkpoint, str | os.PathLike):
            self._read(Path(checkpoint).expanduser(), str(checkpoint), adapter)
        else:
            self._take(checkpoint)

    def _read(self, folder: Path, name: str, adapter: str | None) -> None:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None and manifest.fingerprint and adapter in (None, manifest.adapter):
            self._folder, self._manifest = folder, manifest
            self.fingerprint, self.heads = manifest.fingerprint, manifest.settings.heads
            return
        from ultrarag.encoder import Encoder

        self._take(Encoder.load(name, adapter, precision=self.precision))

    def _take(self, encoder: Encoder) -> None:
        self._encoder, self.precision = encoder, encoder.precision
        self.fingerprint, self.heads = encoder.fingerprint, encoder.heads

    def save(self, target: Path) -> str:
        """Write the generation's own copy, so that moving the original breaks nothing; return its fingerprint."""
        if self._encoder is not None:
            self._encoder.save(target)
        elif self._folder is not None and self._manifest is not None:
            copy_checkpoint(self._folder, self._manifest, target)
        manifest = read_manifest(target)
        assert manifest is not None
        return manifest.fingerprint


def copy_checkpoint(source: Path, manifest: Manifest, target: Path) -> None:
    """Copy the files that a manifest lists, compare them with their checksums, and publish them in one step.

    Not hard links: a later training run may write into the same files.
    """
    with staged_directory(target) as stage:
        for name in (*manifest.files, MANIFEST):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, stage / name)
        if damaged := changed_files(stage, manifest):
            raise CheckpointError(
                f"'{source / damaged[0]}' is not what the checkpoint's manifest says (checksum; {len(damaged)} such "
                f"files): it is damaged, or was changed; save the checkpoint again"
            )
        publish_directory(stage, target)


def enter(core: Core, source: Source, backend: str | None, heads: tuple[str, ...]) -> Generation:
    """Return the unfinished or ready generation of an encoder, or a new one; unfinished ones of others are given up."""
    if core.link is not None and backend not in (None, core.link.uri):
        raise UsageError(f"the vectors of a shared index are all in its server, '{core.link.uri}'; leave backend out")
    wanted = (source.fingerprint, backend or core.live.generation.backend, heads, source.precision)
    for found in core.catalog.all():
        same = (found.fingerprint, found.backend, found.heads, found.precision) == wanted
        if same and found.state in ("building", "ready"):
            return found
        if found.state == "building":
            core.catalog.set_state(found.id, "retired", only_from=("building",))
    with core.writing:  # else a vacuum could forget the log entries that follow
        return core.catalog.add(*wanted, state="building", base_seq=core.store.last_seq())


def finish(core: Core, generation: Generation) -> Generation:
    """Enter a built generation as ready, with the writes that its builder applied."""
    done = read_progress(core.layout.final(generation.id)) or {}
    core.catalog.set_applied(generation.id, int(done.get("applied", generation.base_seq)))
    if core.link is not None:
        core.link.publish_checkpoint(generation)
    if not core.catalog.set_state(generation.id, "ready", only_from=("building",)):
        raise IndexStateError(f"generation {generation.id} was discarded while it was built; build it again")
    return core.catalog.get(generation.id)


def prepare(layout: Layout, generation: Generation, source: Source) -> None:
    """Give a generation that is to be built its directory and its copy of the checkpoint, unless it has them."""
    directory = layout.directory(generation.id)
    directory.mkdir(parents=True, exist_ok=True)
    copy = layout.checkpoint(directory)
    if copy.exists():
        return
    fingerprint = source.save(copy)
    if fingerprint != generation.fingerprint:
        shutil.rmtree(copy)
        raise CheckpointError(
            f"the encoder changes when it is saved: its fingerprint is {generation.fingerprint[:12]} in memory and "
            f"{fingerprint[:12]} on disk; save it as a checkpoint and build from that"
        )


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

    Raises:
        UltraragError: of the kind that stopped the builder.
    """
    threads = threads or max(1, (os.cpu_count() or 2) // 2)
    wish = {None: "auto", True: "always", False: "never"}[progress]
    command = [sys.executable, "-m", "ultrarag.retrieve.build.child", str(root), str(generation.id)]
    command += ["--threads", str(threads), "--progress", wish, *(["--device", device] if device else [])]
    command += ["--ray", ray.to_json()] if ray else []
    # a session of its own: Ctrl-C reaches this process only, which then ends the builder in good order
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=_environment(threads), start_new_session=True
    ) as child:
        started(child)
        try:
            output, _ = child.communicate()
        except BaseException:
            end(child)
            raise
    if child.returncode:
        raise _error(output, child.returncode, generation)


def end(child: subprocess.Popen[str]) -> None:
    """End a builder: politely, then by force."""
    child.terminate()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _environment(threads: int) -> dict[str, str]:
    paths = os.pathsep.join(path for path in sys.path if path)  # a program run from its source folder
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}


def _error(output: str, status: int, generation: Generation) -> Exception:
    """The error that the builder printed as JSON, or one that says how it ended."""
    again = "what it committed is kept: build the same checkpoint again to go on"
    try:
        told = json.loads(output.strip().splitlines()[-1])
        kind = getattr(errors, told["kind"])
        return kind(f"building generation {generation.id}: {told['message']}")
    except (ValueError, IndexError, KeyError, AttributeError, TypeError):
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return IndexStateError(f"the build of generation {generation.id} {how}; {again}")
