"""Which adapter a model folder is loaded with: the one named, unless it cannot be right, or the one that claims it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from ultrarag.checkpoint import Manifest, local_folder, read_manifest
from ultrarag.claims import LEVELS, Claim, ModelFolder, Refusal
from ultrarag.encoder.adapted import base_of, joined
from ultrarag.errors import UsageError
from ultrarag.hookspecs import LoadOptions
from ultrarag.plugins import registry
from ultrarag.untrusted import check_folder

logger = logging.getLogger("ultrarag")

#: (folder, adapter) that were told of: what was chosen is said once.
_told: set[tuple[Path, str]] = set()


def find_adapter(
    model: str | os.PathLike[str],
    usual: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> str:
    """The adapter of a model folder or hub name: its manifest's, else that of the most specific claim.

    Args:
        usual: taken before others where nothing in the folder says more than that several adapters could read it.

    Raises:
        UsageError: no adapter claims it (says what it is), or two do (names both).
    """
    folder = local_folder(str(model), cache_dir, token)
    check_folder(folder)
    base = base_of(folder, LoadOptions(cache_dir=cache_dir, token=token))
    if base is None:
        return adapter_name(None, read_manifest(folder), folder, usual)
    if held := read_manifest(base):
        return held.adapter
    with joined(folder, base) as place:
        return adapter_name(None, None, place, usual)


def adapter_name(name: str | None, manifest: Manifest | None, folder: Path, usual: str | None = None) -> str:
    """The adapter to load a folder with: see `find_adapter`; one that is named, unless it cannot be right.

    Raises:
        UsageError: the named one cannot be right (names the one that is), or none is named and none can be chosen.
    """
    if name and manifest and name != manifest.adapter:
        _check_manifest(name, manifest, folder)
    if manifest and name in (None, manifest.adapter):
        return manifest.adapter
    if name:
        _check_named(name, ModelFolder.to_claim(folder))
        return name
    return _chosen(ModelFolder.to_claim(folder), usual)


def _check_manifest(name: str, manifest: Manifest, folder: Path) -> None:
    """A reranker of ours may look like a plain encoder (a layerwise one does); its manifest knows better."""
    pairs = registry().adapter(name).declared.pair_input
    if manifest.settings.heads == ("scores",) and not pairs:
        raise UsageError(
            f"'{folder}' is a reranker, saved by the adapter '{manifest.adapter}', and '{name}' is an adapter of "
            "embedding models: give an embedding model, or leave the adapter out"
        )


def _check_named(name: str, folder: ModelFolder) -> None:
    answer = registry().answer(name, folder)
    if not isinstance(answer, Refusal):
        return
    answers = registry().answers(folder)
    best, _ = _best(answers, None)
    remedy = f"use the adapter {_or(best)}" if best else _what_else(answers)
    raise UsageError(f"the adapter '{name}' cannot be right for '{folder}': it is {answer.reason}; {remedy}")


def _chosen(folder: ModelFolder, usual: str | None) -> str:
    answers = registry().answers(folder)
    best, reason = _best(answers, usual)
    if len(best) > 1:
        raise UsageError(
            f"'{folder}' is claimed by the adapters {' and '.join(map(repr, best))} ({reason}): name one of them "
            "(adapter=, --adapter)"
        )
    if not best:
        raise UsageError(f"'{folder}' is {folder.family}: {_what_else(answers)}")
    _tell(folder, best[0], reason)
    return best[0]


def _best(answers: dict[str, Claim | Refusal | None], usual: str | None) -> tuple[list[str], str]:
    """The adapters of the most specific level that is claimed, and the first one's reason."""
    for level in reversed(LEVELS):
        claims = {name: answer for name, answer in answers.items() if isinstance(answer, Claim)}
        found = {name: claim.reason for name, claim in claims.items() if claim.level == level}
        if level == "could" and usual in answers and found and not isinstance(answers[usual], Refusal):
            return [usual], f"{next(iter(found.values()))}, as the one in use"
        if found:
            return list(found), next(iter(found.values()))
    return [], ""


def _what_else(answers: dict[str, Claim | Refusal | None]) -> str:
    """What to do where nobody claims a folder."""
    willing = [name for name, answer in answers.items() if answer is None and registry().adapter(name).declared.claims]
    if not willing:
        return f"none of the installed adapters runs that ({', '.join(answers)})"
    pairs = [name for name in willing if registry().adapter(name).declared.pair_input]
    embed = [name for name in willing if name not in pairs]
    ways = [f"{_or(embed)} to embed texts"] * bool(embed) + [f"{_or(pairs)} to score pairs"] * bool(pairs)
    return f"no installed adapter claims it; name one (adapter=, --adapter), such as {', '.join(ways)}"


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)


def _tell(folder: ModelFolder, name: str, reason: str) -> None:
    """Say once, and of the processes of a run only in the first, what was chosen."""
    key = (folder.path.resolve(), name)
    if key not in _told and os.environ.get("RANK", "0") == "0":
        _told.add(key)
        logger.warning("'%s' is read with the adapter '%s' (%s)", folder, name, reason)
