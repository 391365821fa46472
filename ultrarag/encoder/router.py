"""An asymmetric checkpoint as sentence-transformers 6 loads it: a Router with a query and a document route.

The routes name the folders of the sides' own modules, so that nothing is stored for this library alone: a map is one of
its Dense modules with a Normalize behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrarag.adapters import prompts_of
from ultrarag.encoder.low_rank import LowRank, LowRankSide
from ultrarag.io import write_json
from ultrarag.maps import NORMALIZE
from ultrarag.types import EncoderSettings

_LIBRARY = "sentence_transformers"
_ROUTER = f"{_LIBRARY}.models.Router"
_CONFIG = "config_sentence_transformers.json"
#: Parts of a model that its modules there do not have, so that no change of them has to be told.
_OTHER_HEADS = ("sparse_linear.", "colbert_linear.")


@dataclass(frozen=True)
class DeclaredSide:
    """One side of a checkpoint: the folder of its model, those of its maps in order, and its settings."""

    model: str
    maps: tuple[str, ...]
    settings: EncoderSettings
    #: folder of what is added to the model
    low_rank: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """All folders that it names."""
        return (self.model, *self.maps, *([self.low_rank] if self.low_rank else []))


def write_router(folder: Path, sides: Mapping[str, DeclaredSide], settings: EncoderSettings) -> bool:
    """Write the files by which sentence-transformers loads the sides; False where their models have no such form.

    Args:
        sides: "query" and "passage", whose folders are there.
        settings: of the whole model, whose prompts are told.
    """
    routes = {}
    for route, kind in (("query", "query"), ("document", "passage")):
        modules = _modules(folder, sides[kind])
        if modules is None:
            return False
        routes[route] = modules
    types = {name: kind for modules in routes.values() for name, kind in modules}
    structure = {route: [name for name, _ in modules] for route, modules in routes.items()}
    parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
    write_json(folder / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": _ROUTER}])
    config = _read(folder / sides["passage"].model / _CONFIG) or {}
    prompts = {**(config.get("prompts") or {}), **prompts_of(settings)}
    write_json(folder / _CONFIG, {**config, "prompts": prompts})
    return True


def _modules(folder: Path, side: DeclaredSide) -> list[tuple[str, str]] | None:
    """A side's modules in order, (folder, class); None where the model is none of that library."""
    rows = _read(folder / side.model / "modules.json")
    if rows is None:
        return None
    found = [("/".join(filter(None, (side.model, row["path"]))), str(row["type"])) for row in rows]
    if side.low_rank:
        changes = LowRank.load(folder / side.low_rank)
        if not all(name.startswith(("backbone.", *_OTHER_HEADS)) for name in changes.names):
            return None
        write_json(folder / side.low_rank / "config.json", {"transformer": found[0][0]})
        found[0] = (side.low_rank, f"{LowRankSide.__module__}.{LowRankSide.__name__}")
    for name in side.maps:
        found.append((name, f"{_LIBRARY}.models.Dense"))
        if (folder / name / NORMALIZE).is_dir():
            found.append((f"{name}/{NORMALIZE}", f"{_LIBRARY}.models.Normalize"))
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
