"""The files of late-interaction models: what the layouts of PyLate, Stanford and sentence-transformers declare."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrarag.adapters.sentence_transformers_files import ModelConfig, OtherModules, read_model_config
from ultrarag.claims import ModelFolder
from ultrarag.errors import CheckpointError

#: Tokens of a query, markers and special tokens included, where a layout says none.
QUERY_LENGTH = 32
#: Tokens of a passage where PyLate's files say none.
_PASSAGE_LENGTH = 180
_PUNCTUATION = tuple(string.punctuation)
_PYLATE_DENSE = "pylate.models.Dense.Dense"
_HANDLED = ("Transformer", "Dense", "MultiVectorMask", "Normalize")


@dataclass
class Declaration:
    """How a late-interaction model reads texts and what stands behind its backbone."""

    #: pylate, stanford or sentence-transformers
    layout: str
    #: folder of the transformer, relative to the model's
    transformer: str = ""
    #: folders of all modules, relative to the model's
    places: list[str] = field(default_factory=list)
    #: folders of the projections in order; of Stanford's layout the one projection is among the backbone's weights
    dense: list[str] = field(default_factory=list)
    normalize: bool = True
    #: the tokens that PyLate and Stanford put behind a text's first one; elsewhere they are in the prompts
    query_marker: str = ""
    passage_marker: str = ""
    #: a query is filled with mask tokens up to so many; None: it is not
    expansion: int | None = QUERY_LENGTH
    #: other tokens see those that fill a query
    attend: bool = False
    #: what fills a query; None: the mask token
    filler: str | None = None
    query_length: int | None = None
    passage_length: int | None = None
    #: tokens that are not compared, in passages and, where the next says so, in queries
    skipped: tuple[str, ...] = ()
    skipped_in_queries: bool = False
    config: ModelConfig = field(default_factory=ModelConfig)


def read_late_interaction(path: Path) -> Declaration:
    """Read what a folder declares, whichever layout it has.

    Raises:
        OtherModules: modules that are not run here.
        CheckpointError: damaged files, or no late-interaction model.
    """
    folder = ModelFolder(path)
    if folder.family.name != "late-interaction":
        raise CheckpointError(f"{path} is {folder.family}: the adapter 'colbert' reads late-interaction models alone")
    if not folder.modules:
        return _stanford(folder)
    native = any(row["type"].split(".")[-1] == "MultiVectorMask" for row in folder.modules)
    found = Declaration("sentence-transformers" if native else "pylate", config=read_model_config(path))
    _read_modules(folder, found)
    if native:
        _read_native(folder, found)
    else:
        _read_pylate(folder, found)
    if found.config.truncate_dim is not None:
        raise OtherModules(f"{path}: truncate_dim of token vectors is not supported")
    return found


def _read_modules(folder: ModelFolder, found: Declaration) -> None:
    file = folder.path / "modules.json"
    kinds = []
    for row in folder.modules:
        kind = str(row["type"])
        name = kind.split(".")[-1]
        own = kind.startswith("sentence_transformers.") or kind == _PYLATE_DENSE
        if not own or name not in _HANDLED:
            raise OtherModules(
                f"{file}: module '{kind}' is not one that the adapter 'colbert' runs ({', '.join(_HANDLED)})"
            )
        kinds.append(name)
        found.places.append(str(row.get("path", "")))
        if name == "Transformer":
            found.transformer = found.places[-1]
        elif name == "Dense":
            found.dense.append(found.places[-1])
    found.normalize = found.layout == "pylate" or "Normalize" in kinds


def _read_pylate(folder: ModelFolder, found: Declaration) -> None:
    """config_sentence_transformers.json as PyLate writes it: its markers are tokens, and a prompt follows them."""
    values = folder.library
    found.query_marker = _or(values.get("query_prefix"), "[Q] ")
    found.passage_marker = _or(values.get("document_prefix"), "[D] ")
    found.query_length = int(values.get("query_length") or QUERY_LENGTH)
    found.passage_length = int(values.get("document_length") or _PASSAGE_LENGTH)
    found.expansion = None if values.get("do_query_expansion") is False else found.query_length
    found.attend = bool(values.get("attend_to_expansion_tokens"))
    words = values.get("skiplist_words")
    found.skipped = _PUNCTUATION if words is None else tuple(map(str, words))


def _read_native(folder: ModelFolder, found: Declaration) -> None:
    """The files of a MultiVectorEncoder: prompts, the Transformer's own configuration, and the mask's."""
    inner = f"{found.transformer}/sentence_bert_config.json".lstrip("/")
    values = folder.json(inner)
    limit = values.get("max_seq_length")
    found.query_length = values.get("query_length") or limit
    found.passage_length = values.get("document_length") or limit
    expansion = values.get("query_expansion")
    if expansion is None:
        found.expansion = None
    else:
        found.expansion, found.filler = int(expansion["length"]), expansion.get("token")
        found.attend = bool(expansion.get("attend"))
        if expansion.get("strategy") == "fixed":
            found.query_length = found.expansion
    place = next(str(row["path"]) for row in folder.modules if row["type"].endswith(".MultiVectorMask"))
    mask = folder.json(f"{place}/config.json")
    if mask.get("keep_only_token_ids"):
        raise OtherModules(f"{folder}/{place}: a list of token ids to keep is of models that read images")
    tasks = mask.get("skiplist_tasks") or ["document"]
    found.skipped = tuple(mask.get("skiplist_words") or ()) if "document" in tasks else ()
    found.skipped_in_queries = "query" in tasks


def _stanford(folder: ModelFolder) -> Declaration:
    values = folder.json("artifact.metadata")
    length = int(values.get("query_maxlen") or QUERY_LENGTH)
    return Declaration(
        "stanford",
        query_marker=(values.get("query_token_id") or "[unused0]") + " ",
        passage_marker=(values.get("doc_token_id") or "[unused1]") + " ",
        expansion=length,
        attend=bool(values.get("attend_to_mask_tokens")),
        query_length=length,
        passage_length=int(values.get("doc_maxlen") or _PASSAGE_LENGTH),
        skipped=_PUNCTUATION if values.get("mask_punctuation", True) else (),
    )


def _or(value: Any, default: str) -> str:
    return default if value is None else str(value)


#: What a checkpoint's weights lie in, which are written anew.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".onnx", ".h5", ".msgpack", ".ot", ".md")
#: Files above this size are none of a layout's.
_LARGEST = 64 << 20


def small_files(folder: Path, places: list[str]) -> dict[str, bytes]:
    """The layout's own files, by their path in the folder: at its root and in the modules' folders."""
    found = {}
    for place in dict.fromkeys(["", *places]):
        for path in sorted((folder / place).glob("*")):
            kept = path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json")
            if kept and path.stat().st_size <= _LARGEST:
                found[f"{place}/{path.name}".lstrip("/")] = path.read_bytes()
    return found
