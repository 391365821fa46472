"""The encoder of a generation, its copy in the index, and the draft of its vectors while they are built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ultrarag.checkpoint import MANIFEST, Identity, Manifest, copy_checkpoint, local_folder, read_manifest
from ultrarag.claims import ModelFolder
from ultrarag.encode import Encode, Encoded
from ultrarag.encoder import Cuts
from ultrarag.encoder.engines import INT8, Quantised, copy_quantised, family, is_int8
from ultrarag.errors import CheckpointError, UsageError, did_you_mean
from ultrarag.io import sha256_of, sync_tree, write_json
from ultrarag.quantise import Calibration
from ultrarag.retrieve.engines import SCHEMA_FILE, Backend, Schema, create, open_backend, remove
from ultrarag.retrieve.generation.catalog import Generation, IndexLayout, Progress
from ultrarag.retrieve.generation.replay import GenerationVectors, Noted
from ultrarag.retrieve.passages import Store
from ultrarag.untrusted import code_refused

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder, LateEncoder


#: The heads that an index can store.
STORED = ("dense", "sparse", "colbert")


def stored_heads(available: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The heads to store: those wanted, else all that the encoder has.

    Raises:
        UsageError: when the encoder lacks one, or has none (a cross-encoder).
    """
    if "scores" in available:
        raise UsageError(
            "the encoder is a reranker, which scores (query, passage) pairs: an index needs an embedding model"
        )
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


def find_source(
    checkpoint: str | os.PathLike[str] | Encoder,
    adapter: str | None,
    layout: IndexLayout,
    live: Generation,
    trust_remote_code: bool = False,
    precision: str | None = None,
) -> Source:
    """The encoder to build a generation with; `adapter` where it is named, else the one that claims the folder.

    Args:
        precision: default: that of an encoder that is given; of a folder, the live generation's.

    Raises:
        UsageError: no adapter is named, and the one that claims the folder gives no head that the live generation has.
    """
    name = adapter or generation_adapter(checkpoint, layout, live)
    if precision is None and isinstance(checkpoint, str | os.PathLike):
        precision = family(live.precision)
    found = Source(checkpoint, name, precision, trust_remote_code)
    stored_heads(found.heads, None)
    if name is not None and adapter is None and (missing := [head for head in live.heads if head not in found.heads]):
        raise UsageError(
            f"'{checkpoint}' has no ultrarag.json; read with the adapter '{name}' it has no head '{missing[0]}', which "
            f"the live generation has: name its adapter (adapter=, --adapter) if that is meant"
        )
    return found


def generation_adapter(
    checkpoint: str | os.PathLike[str] | Encoder, layout: IndexLayout, live: Generation
) -> str | None:
    """The adapter of a model folder without a manifest; the live generation's, where several could read it."""
    if not isinstance(checkpoint, str | os.PathLike) or read_manifest(local_folder(str(checkpoint))) is not None:
        return None
    from ultrarag.encoder import find_adapter

    held = read_manifest(layout.checkpoint(layout.directory(live.id)))
    return find_adapter(checkpoint, usual=held.adapter if held else None)


class Source:
    """The encoder that a generation is to have: a checkpoint of ours, or one that is loaded."""

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | Encoder,
        adapter: str | None = None,
        precision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Read a checkpoint's manifest; `trust_remote_code` is for one that is not loaded.

        Args:
            precision: default: fp32, or that of an encoder which is loaded.

        Raises:
            UsageError: it is run by code that comes with it, and that was not allowed.
        """
        self._folder: Path | None = None
        self._encoder: Encoder | None = None
        self._manifest: Manifest | None = None
        #: named, where the checkpoint does not name its own
        self.adapter = adapter
        self.precision = precision or "fp32"
        #: what int8 is calibrated on by the builder, where the checkpoint is not quantised
        self.calibration: Calibration | None = None
        #: code that comes with the model may be run, by whatever process loads the index's copy
        self.trust_remote_code = trust_remote_code
        if isinstance(checkpoint, str | os.PathLike):
            self._read(Path(checkpoint).expanduser(), str(checkpoint), adapter)
        else:
            self._take(checkpoint, precision)

    @property
    def uncalibrated(self) -> bool:
        """Whether it is to be in int8, and nothing is quantised yet: `calibrate` it before it is entered."""
        return self.precision == INT8

    def calibrate(self, calibration: Calibration) -> None:
        """Have the builder quantise it.

        Raises:
            UsageError: a package is missing, or the model is of two sides.
        """
        if self.identity.sides is not None:
            raise UsageError(
                "a model of two sides is not quantised: say precision='fp32' (--precision fp32) for this generation"
            )
        from ultrarag.quantise import calibrated_precision

        self.calibration, self.precision = calibration, calibrated_precision(self.fingerprint, calibration)

    def _read(self, folder: Path, name: str, adapter: str | None) -> None:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is not None and manifest.fingerprint and adapter in (None, manifest.adapter):
            if manifest.remote_code and not self.trust_remote_code:
                raise code_refused(folder)
            self._folder, self._manifest = folder, manifest
            self.fingerprint, self.heads = manifest.fingerprint, manifest.settings.heads
            self._choose_quantised()
            return
        from ultrarag.encoder import Encoder

        own = "fp32" if is_int8(self.precision) else self.precision
        encoder = Encoder.load(name, adapter, precision=own, trust_remote_code=self.trust_remote_code)
        self._folder = local_folder(name)
        self._take(encoder, self.precision)

    def _take(self, encoder: Encoder, precision: str | None) -> None:
        self._encoder, self.precision = encoder, precision or encoder.precision
        self.adapter, self.trust_remote_code = encoder.adapter.name, encoder.trust_remote_code
        self.fingerprint, self.heads = encoder.fingerprint, encoder.heads
        self._choose_quantised()

    def _choose_quantised(self) -> None:
        """Take what is quantised beside the checkpoint, if it is of this model."""
        record = Quantised.read(self._folder) if self._folder is not None else None
        if self.uncalibrated and record is not None and record.fingerprint == self.fingerprint:
            self.precision = record.precision

    @cached_property
    def identity(self) -> Identity:
        """Who the encoder is, and who its sides are."""
        if self._manifest is not None:
            return self._manifest.identity
        assert self._encoder is not None
        return self._encoder.identity()

    def save(self, target: Path) -> str:
        """Write the generation's own copy, so that moving the original breaks nothing; return its fingerprint."""
        if self._encoder is not None:
            self._encoder.save(target)
        elif self._folder is not None and self._manifest is not None:
            copy_checkpoint(self._folder, self._manifest, target)
        if self._folder is not None and self.calibration is None:
            copy_quantised(self._folder, target)
        manifest = read_manifest(target)
        assert manifest is not None
        return manifest.fingerprint


def identity_of(layout: IndexLayout, generation: Generation) -> Identity:
    """Who a generation's encoder is, and who its sides are, as its copy in the index says."""
    folder = layout.checkpoint(layout.directory(generation.id))
    if (manifest := read_manifest(folder)) is None:
        raise CheckpointError(f"'{folder}' has no {MANIFEST}: restore the folder from a copy")
    return manifest.identity


def prepare(layout: IndexLayout, generation: Generation, source: Source) -> None:
    """Give a generation that is to be built its directory and its copy of the checkpoint, unless it has them."""
    directory = layout.directory(generation.id)
    directory.mkdir(parents=True, exist_ok=True)
    copy = layout.checkpoint(directory)
    if not copy.exists():
        _save(source, copy, generation)
    if source.trust_remote_code and not layout.consent(directory).exists():
        record_consent(directory)
    if source.calibration is not None:
        source.calibration.write(layout.calibration(directory))


def quantise_own(directory: Path, generation: Generation) -> None:
    """Quantise a generation's own copy of its encoder, where it is to be and is not yet."""
    from ultrarag.quantise import quantise_copy

    file = IndexLayout.calibration(directory)
    if is_int8(generation.precision) and file.is_file():
        quantise_copy(IndexLayout.checkpoint(directory), Calibration.kept(file), has_consent(directory))


def _save(source: Source, copy: Path, generation: Generation) -> None:
    fingerprint = source.save(copy)
    if fingerprint != generation.fingerprint:
        shutil.rmtree(copy)
        raise CheckpointError(
            f"the encoder changes when it is saved: its fingerprint is {generation.fingerprint[:12]} in memory and "
            f"{fingerprint[:12]} on disk; save it as a checkpoint and build from that"
        )


def record_consent(directory: Path) -> None:
    """Write down that the code in a generation's copy of its checkpoint may be run, as it is now."""
    folder = IndexLayout.checkpoint(directory)
    if ModelFolder(folder).code:
        write_json(IndexLayout.consent(directory), {"trust_remote_code": True, "code": _code(folder)})


def consent(layout: IndexLayout, generation: Generation) -> None:
    """Write consent down for the code of a generation that is here, where it has some and none was given yet."""
    directory = layout.final(generation.id)
    if not layout.consent(directory).exists():
        record_consent(directory)


def inherit_consent(layout: IndexLayout, directory: Path) -> None:
    """Write consent down for a generation that was fetched, where all of its code was allowed here with another one."""
    folder = IndexLayout.checkpoint(directory)
    allowed: set[str] = set()
    for other in layout.generations.iterdir():
        with suppress(CheckpointError):  # code that was changed since allows nothing
            if other != directory and has_consent(other):
                allowed |= set(_code(IndexLayout.checkpoint(other)).values())
    if allowed and set(_code(folder).values()) <= allowed:
        record_consent(directory)


def has_consent(directory: Path) -> bool:
    """Whether code in a generation's copy of its checkpoint may be run.

    Raises:
        CheckpointError: it is not the code that was consented to.
    """
    file = IndexLayout.consent(directory)
    if not file.is_file():
        return False
    try:
        allowed = json.loads(file.read_text(encoding="utf-8"))["code"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    folder = IndexLayout.checkpoint(directory)
    if _code(folder) != allowed:
        raise CheckpointError(
            f"the Python code in {folder} is not what was allowed to run when the encoder came into the index: restore "
            "the folder from a copy, or build a new generation"
        )
    return True


def _code(folder: Path) -> dict[str, str]:
    """The checksums of the Python files in a folder, by name."""
    return {str(file.relative_to(folder)): sha256_of(file) for file in sorted(folder.rglob("*.py"))}


def load_encoder(
    directory: Path, generation: Generation, device: str | None = None, beside: Encoder | None = None
) -> Encoder:
    """Load a generation's own copy of its encoder; CheckpointError when it is not the one it was.

    Args:
        beside: an encoder in memory, on the same device: what it shares is not read again.
    """
    from ultrarag.encoder import Encoder, load_beside

    folder = IndexLayout.checkpoint(directory)
    trusted = has_consent(directory)
    encoder = None
    if beside is not None and (beside.precision, beside.trust_remote_code) == (generation.precision, trusted):
        encoder = load_beside(folder, beside)
    if encoder is None:
        encoder = Encoder.load(folder, device=device, precision=generation.precision, trust_remote_code=trusted)
    if encoder.fingerprint != generation.fingerprint:
        raise CheckpointError(
            f"{folder} is not the encoder of generation {generation.id} any more (fingerprint "
            f"{encoder.fingerprint[:12]} instead of {generation.fingerprint[:12]}): restore the folder from a copy, or "
            f"build a new generation"
        )
    return encoder


def begin_late(directory: Path, generation: Generation, device: str | None) -> LateEncoder | None:
    """A generation's encoder that is loaded when it is needed; None where it must be loaded now."""
    from ultrarag.encoder import late_encoder

    if device not in (None, "cpu") or has_consent(directory):
        return None
    return late_encoder(
        IndexLayout.checkpoint(directory),
        generation.fingerprint,
        generation.precision,
        lambda: load_encoder(directory, generation, "cpu"),
    )


def publish(layout: IndexLayout, generation: Generation) -> None:
    """Give the directory of a generation its final name, unless it has it."""
    building = layout.building(generation.id)
    if building.exists():
        sync_tree(building)
        os.rename(building, layout.final(generation.id))


def encoded_of(root: Path, generation: Generation, last: int = 0) -> Encoded:
    """The vectors of a generation that are there before it is built: made by the ranks of torchrun, or mapped.

    Args:
        last: the store's last row, for whoever makes them.
    """
    return Encoded(root, generation.fingerprint, generation.heads, generation.precision, last)


class Draft:
    """What a build works on; only its process writes to it, and the store is only read."""

    def __init__(self, root: Path, generation: Generation, encoder: Encoder) -> None:
        """Open what an earlier start left, or begin anew where it had not committed anything."""
        self.layout, self.generation = IndexLayout(root), generation
        self.directory = self.layout.building(generation.id)
        self.store = Store.open(root, read_only=True)
        found = Progress.read(self.directory)
        #: whether an earlier start committed something
        self.begun = found is not None
        self.progress = found or Progress(applied=generation.base_seq)
        self.backend = self._vectors(encoder)
        #: texts that were longer than the encoder takes
        self.cuts = Cuts()

    def vectors(self, encode: Encode) -> GenerationVectors:
        """The vectors so far as what passages are put into; the progress notes those that cannot be encoded."""
        return GenerationVectors(self.backend, encode, Noted(self.progress.unencoded))

    def total(self) -> int:
        """The number of passages to encode, as far as it is known."""
        return max(self.store.count(), self.progress.held)

    def note(self) -> None:
        """Write down how far the build has come."""
        self.progress.total = self.total()
        self.progress.write(self.directory)

    def commit(self, finished: bool = False) -> None:
        """Make the vectors durable, then the note of how far they go."""
        self.backend.flush()
        self.progress.finished = finished
        self.note()

    def publish(self) -> None:
        """Close everything, and give the directory its final name."""
        self.backend.close()
        self.store.close()
        publish(self.layout, self.generation)

    def _vectors(self, encoder: Encoder) -> Backend:
        directory = self.layout.vectors(self.directory)
        if not self.begun:
            remove(directory)
        if not (directory / SCHEMA_FILE).exists():
            return create_vectors(encoder, self.generation, directory)
        return open_backend(directory, encoder.passage_fingerprint)


def create_vectors(encoder: Encoder, generation: Generation, directory: Path) -> Backend:
    """Create the empty vector engine of a generation."""
    probe = encoder.encode(["dimension"], "passage", heads=generation.heads, progress=False)
    return create(directory, Schema.of(probe, encoder.passage_fingerprint), generation.backend)
