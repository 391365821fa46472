"""The files by which sentence-transformers knows a model: read what they declare, write them beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrarag.claims import library_module
from ultrarag.errors import CheckpointError
from ultrarag.types import EncoderSettings

#: Our name of a pooling and theirs; weighted means are "weightedmean" there.
_POOLING_NAMES = {"cls": "cls", "mean": "mean", "last_token": "lasttoken", "weighted_mean": "weightedmean"}
_OLD_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last_token",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
#: Prompts of passages, in the order in which the library looks for them.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
#: Modules that only route or mark; anything else that is not handled below is refused.
_HANDLED = ("Transformer", "Pooling", "Normalize", "Dense")


class OtherModules(CheckpointError):
    """The modules of a checkpoint are not those that are run here; nothing is wrong with it."""


@dataclass
class ModelConfig:
    """What `config_sentence_transformers.json` says of a model beside its modules."""

    #: name -> text put before what is encoded; an empty one is as good as any
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str | None = None
    truncate_dim: int | None = None
    max_active_dims: int | None = None

    @property
    def query_prompt(self) -> str:
        """The prompt called "query"; the default one where the model names its query prompt otherwise."""
        return self.prompts.get("query", self.prompts.get(self.default_prompt or "", ""))

    @property
    def passage_prompt(self) -> str:
        """The first declared of the names that the library looks for; never the default, as in `encode_document`."""
        return next((self.prompts[name] for name in _PASSAGE_PROMPTS if name in self.prompts), "")

    def settings(self) -> dict[str, Any]:
        """The fields of EncoderSettings that it decides."""
        return {
            "query_instruction": self.query_prompt,
            "passage_instruction": self.passage_prompt,
            "prompts": self.prompts,
            "default_prompt": self.default_prompt,
            "similarity": self.similarity,
            "truncate_dim": self.truncate_dim,
            "max_active_dims": self.max_active_dims,
        }


def read_model_config(folder: Path) -> ModelConfig:
    """Read `config_sentence_transformers.json`; an empty one where there is none.

    Raises:
        CheckpointError: it is damaged, or cuts vectors to no dimensions.
    """
    path = folder / "config_sentence_transformers.json"
    values = read_json(path) if path.is_file() else {}
    prompts = {name: text for name, text in (values.get("prompts") or {}).items() if text is not None}
    default = values.get("default_prompt_name")
    cuts = {name: values.get(name) for name in ("truncate_dim", "max_active_dims")}
    for name, cut in cuts.items():
        if cut is not None and (isinstance(cut, bool) or not isinstance(cut, int) or cut < 1):
            raise CheckpointError(f"{path}: {name} is {cut!r}; it is a whole number above 0, or left out")
    return ModelConfig(prompts, default if default in prompts else None, values.get("similarity_fn_name"), **cuts)


def compares_by_length(folder: Path) -> bool:
    """Whether a checkpoint declares that its vectors are compared by dot product, and does not give them unit length.

    Raises:
        CheckpointError: its files cannot be read.
    """
    if read_model_config(folder).similarity != "dot" or not (folder / "modules.json").is_file():
        return False
    modules = read_json(folder / "modules.json")
    return not any(library_module(str(module["type"])) == "Normalize" for module in modules)


@dataclass
class ModulesDeclaration:
    """What `modules.json` and the files that it names say about a model."""

    #: folder of the transformer, relative to the model's
    transformer: str = ""
    pooling: str | None = None
    normalize: bool = False
    #: folders of Dense projections in order
    dense: list[str] = field(default_factory=list)
    max_length: int | None = None
    config: ModelConfig = field(default_factory=lambda: ModelConfig())


def read_declaration(folder: Path) -> ModulesDeclaration | None:
    """Read `modules.json` of a local model folder; None where there is none.

    Raises:
        CheckpointError: when it names a module whose function we do not reproduce.
    """
    if not (folder / "modules.json").is_file():
        return None
    found = ModulesDeclaration()
    for module in read_json(folder / "modules.json"):
        name, path = library_module(str(module["type"])), str(module.get("path", ""))
        if name not in _HANDLED:
            raise OtherModules(
                f"{folder / 'modules.json'}: module '{module['type']}' is not one that this adapter runs by itself "
                f"({', '.join(_HANDLED)})"
            )
        if name == "Transformer":
            found.transformer = path
        elif name == "Pooling":
            found.pooling = _read_pooling(folder / path / "config.json")
        elif name == "Dense":
            found.dense.append(path)
        else:
            found.normalize = True
    lengths = folder / found.transformer / "sentence_bert_config.json"
    if lengths.is_file():
        found.max_length = read_json(lengths).get("max_seq_length")
    found.config = read_model_config(folder)
    return found


def _read_pooling(path: Path) -> str:
    values = read_json(path)
    if "pooling_mode" in values:
        given = values["pooling_mode"]
        known = {theirs: ours for ours, theirs in _POOLING_NAMES.items()}
        names = [known.get(name, str(name)) for name in ([given] if isinstance(given, str) else given)]
    else:
        names = [name for flag, name in _OLD_FLAGS.items() if values.get(flag)]
    if len(names) != 1 or names[0] not in _POOLING_NAMES:
        raise OtherModules(
            f"{path}: pooling {' and '.join(names) or 'of no kind'} is not one that this adapter runs by itself "
            f"({', '.join(_POOLING_NAMES)})"
        )
    if not values.get("include_prompt", True):
        raise OtherModules(f"{path}: pooling that leaves the prompt out (include_prompt false) is not supported")
    return names[0]


def write_declaration(folder: Path, settings: EncoderSettings, dim: int, dense: list[str] | None = None) -> None:
    """Write `modules.json` and its companions so that sentence-transformers gives the same dense vectors.

    Args:
        folder: the checkpoint, with the transformer's own files at its root.
        dim: the width of the transformer's hidden states.
        dense: folders of Dense projections, already written.
    """
    pooling = settings.pooling or "cls"
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
    modules += [(path, "sentence_transformers.models.Dense") for path in dense or []]
    if settings.normalize:
        modules.append((f"{len(modules)}_Normalize", "sentence_transformers.models.Normalize"))
        (folder / modules[-1][0]).mkdir(exist_ok=True)
        # git and object stores drop empty directories, and the loader wants this one to exist
        write_json(folder / modules[-1][0] / "config.json", {})
    rows = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    write_json(folder / "modules.json", rows)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", _pooling_config(pooling, dim))
    length = max(settings.query_max_length or 0, settings.passage_max_length or 0)
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": length or None, "do_lower_case": False},
    )
    config: dict[str, Any] = {
        "prompts": prompts_of(settings),
        "default_prompt_name": settings.default_prompt,
        "similarity_fn_name": settings.similarity or ("cosine" if settings.normalize else "dot"),
    }
    if settings.truncate_dim is not None:
        config["truncate_dim"] = settings.truncate_dim
    write_json(folder / "config_sentence_transformers.json", config)


def _pooling_config(pooling: str, dim: int) -> dict[str, Any]:
    """The flags of sentence-transformers before 6, which later releases read too."""
    flags = {flag: name == pooling for flag, name in _OLD_FLAGS.items()}
    return {"word_embedding_dimension": dim, **flags, "include_prompt": True}


def prompts_of(settings: EncoderSettings) -> dict[str, str]:
    """All named prompts, those of queries and passages as they are now.

    They are plain prefixes: a format that puts text after the query cannot be one, and is left out.
    """
    query = _prefix(settings.query_format, settings.query_instruction) or _prefix(settings.query_plain_format)
    passage = _prefix(settings.passage_format, settings.passage_instruction)
    found = {**settings.prompts, "query": query, "document": passage}
    used = next((name for name in _PASSAGE_PROMPTS if name in settings.prompts), "document")
    return {**found, used: passage}


def _prefix(template: str, *instruction: str) -> str:
    return template.format(*instruction, "") if all(instruction) and template.endswith("{}") else ""


def read_json(path: Path) -> Any:
    """The value in a JSON file; CheckpointError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
