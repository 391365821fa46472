"""Loading a checkpoint beside an encoder that has one of its models in memory, which is used and not read again."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ultrarag.checkpoint import Identity, Manifest, fingerprint, read_manifest
from ultrarag.encoder.encoder import Encoder
from ultrarag.encoder.engine_of import engine_of
from ultrarag.encoder.engines import is_int8
from ultrarag.encoder.load import declared_options, settings_of
from ultrarag.encoder.sides import SIDES, SidedAdapter, Sides, load_sides, read_sides
from ultrarag.hookspecs import LoadOptions
from ultrarag.untrusted import check_folder

if TYPE_CHECKING:
    from torch import nn

    from ultrarag.plugins import Adapter


def load_beside(path: str | PathLike[str], other: Encoder, engine: str | None = None) -> Encoder | None:
    """Load a checkpoint of ours with the models that `other` has in memory, and read those only that it has not.

    The two encoders then share these models. They are told by their fingerprints, so that nothing depends on where a
    checkpoint came from. Of the files that are not read it is checked that they are there, and as long as they were.

    Returns:
        On the device and with the precision of `other`; None where it has none of the checkpoint's models,
        or is in int8.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    folder = Path(path)
    if is_int8(other.precision):  # each model is quantised by itself
        return None
    check_folder(folder)
    manifest, plain = read_manifest(folder), _plain(other)
    if manifest is None or manifest.adapter != plain.name:
        return None
    held = _held(other)
    options = LoadOptions(trust_remote_code=other.trust_remote_code)
    if manifest.sides is None:
        found = _symmetric(manifest, plain, options, held, other)
    elif (folder / SIDES).is_file():
        found = _asymmetric(folder, manifest, plain, options, held, other)
    else:
        found = None
    if found is not None:
        found.trust_remote_code = other.trust_remote_code
        found._engine = engine_of(found, engine, lambda: found.fingerprint)
    return found


def _plain(encoder: Encoder) -> Adapter:
    return encoder.adapter.plain if isinstance(encoder.adapter, SidedAdapter) else encoder.adapter


def _held(encoder: Encoder) -> dict[str, nn.Module]:
    """The models in memory, by the fingerprint that each has alone."""
    if not isinstance(encoder.model, Sides):
        return {encoder.fingerprint: encoder.model}
    sides = encoder.known_identity.sides or {}
    return {side["unmapped"]: encoder.model.side(cast(Any, kind)) for kind, side in sides.items()}


def _symmetric(
    manifest: Manifest, plain: Adapter, options: LoadOptions, held: dict[str, nn.Module], other: Encoder
) -> Encoder | None:
    model = held.get(manifest.fingerprint)
    if model is None:
        return None
    settings = settings_of(model, plain, declared_options(options, manifest.settings), manifest)
    found = Encoder(plain, model, settings, manifest, other.device, other.precision)
    found.known_identity = Identity(manifest.fingerprint)
    return found


def _asymmetric(
    folder: Path,
    manifest: Manifest,
    plain: Adapter,
    options: LoadOptions,
    held: dict[str, nn.Module],
    other: Encoder,
) -> Encoder | None:
    unmapped = {kind: side["unmapped"] for kind, side in (manifest.sides or {}).items()}
    declared = read_sides(folder)
    plain_sides = {kind: side for kind, side in declared.items() if not side.low_rank and unmapped[kind] in held}
    if not plain_sides:
        return None
    known = {side.model: held[unmapped[kind]] for kind, side in plain_sides.items()}
    model = load_sides(plain, folder, options, known)
    adapter = SidedAdapter.around(plain)
    found = Encoder(
        adapter, model, settings_of(model, adapter, options, manifest), manifest, other.device, other.precision
    )
    alone = {
        kind: unmapped[kind]
        if kind in plain_sides
        else fingerprint(model.side(kind), plain.name, model.side_settings(kind))
        for kind in ("query", "passage")
    }
    maps = {kind: [item.digest for item in model.maps_of(kind)] for kind in ("query", "passage")}
    found.known_identity = Identity.of_sides(*((alone[kind], maps[kind]) for kind in ("query", "passage")))
    return found
