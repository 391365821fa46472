"""Claims: what a model folder says that it is, read from its small files, and what an adapter may say to that.

Nothing here reads weights or imports a deep-learning library: an adapter answers for a folder in a millisecond.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple

#: How much of a folder points to an adapter, from the least: any model of this sort could be read with it; it runs this
#: kind of model; something is there that it alone reads.
Level = Literal["could", "kind", "exact"]
LEVELS: tuple[Level, ...] = ("could", "kind", "exact")


class Claim(NamedTuple):
    """An adapter is the one for a folder."""

    #: what in the folder says so, such as "config.json: model_type acme"
    reason: str
    level: Level = "kind"


class Refusal(NamedTuple):
    """An adapter cannot be right for a folder, and is not to be used even where it is named."""

    #: what the folder is, such as "a cross-encoder (config.json: BertForSequenceClassification)"
    reason: str


#: What an adapter's `claims(folder)` returns; a text is a Claim of the level "kind", None: it does not say.
Answer = Claim | Refusal | str | None

#: The families of models, as errors call them.
FAMILIES = {
    "dense": "an embedding model of sentence-transformers",
    "body": "an encoder without a declared use",
    "sparse": "a learned sparse encoder (SPLADE)",
    "router": "a model with ways of its own for queries and for documents",
    "static": "a model of static token embeddings",
    "late-interaction": "a late-interaction model (ColBERT)",
    "cross-encoder": "a cross-encoder, which scores (query, passage) pairs",
    "causal-reranker": "a causal reranker, a language model asked about (query, passage) pairs in its own words",
    "ranking-lm": "a language model that scores (query, passage) pairs and does not say how it reads them",
    "causal-lm": "a language model, which says neither that it embeds nor that it reranks",
    "classifier": "a classifier",
    "encoder-decoder": "an encoder with a decoder",
    "lora": "a folder of LoRA matrices without their base model",
    "unknown": "no model that is known here",
}


@dataclass(frozen=True)
class Family:
    """What kind of model a folder holds, and which file says so."""

    #: one of FAMILIES
    name: str
    evidence: str

    def __str__(self) -> str:
        return f"{FAMILIES[self.name]} ({self.evidence})"


#: The file of a checkpoint of two sides, and the folders of their models, of which the passages' is always there.
_SIDES = "sides.json"
_SIDE_FOLDERS = ("passage", "query")


class ModelFolder:
    """The small files of a model folder; what is missing or damaged reads as empty, for the loader tells of that."""

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def to_claim(cls, path: str | PathLike[str]) -> ModelFolder:
        """What adapters are asked about: of a checkpoint of two sides (docs/asymmetric.md), the passages' model."""
        folder = cls(path)
        return cls(folder.path / _SIDE_FOLDERS[0]) if folder.has(_SIDES) else folder

    def __fspath__(self) -> str:
        return fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def has(self, *names: str) -> bool:
        """Whether all these files are there."""
        return all((self.path / name).is_file() for name in names)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object in the folder."""
        found = self._read(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, or that of the first module where it has a folder of its own."""
        first = str(self.modules[0]["path"]) if self.modules else ""
        return self.json("config.json") or self.json(f"{first}/config.json")

    @property
    def model_type(self) -> str:
        """The model type of config.json."""
        return str(self.config.get("model_type") or "")

    @cached_property
    def architectures(self) -> list[str]:
        """The classes that config.json names."""
        names = self.config.get("architectures")
        return [str(name) for name in names] if isinstance(names, list) else []

    @cached_property
    def modules(self) -> list[dict[str, Any]]:
        """The rows of modules.json, each with `type` and `path`."""
        found = self._read("modules.json")
        rows = found if isinstance(found, list) else []
        return [{"path": "", **row} for row in rows if isinstance(row, dict) and isinstance(row.get("type"), str)]

    @cached_property
    def library(self) -> dict[str, Any]:
        """config_sentence_transformers.json."""
        return self.json("config_sentence_transformers.json")

    @cached_property
    def card_head(self) -> str:
        """The head of the model card, README.md, between its lines of dashes."""
        head = re.match(r"\s*---\s*\n(.*?)\n---", self.text("README.md"), flags=re.DOTALL)
        return head[1] if head else ""

    @cached_property
    def card(self) -> dict[str, str]:
        """The plain `name: value` lines at the head of the model card, such as its pipeline_tag."""
        return dict(re.findall(r"^(\w+):[ \t]*['\"]?([^'\"\n]+?)['\"]?[ \t]*$", self.card_head, flags=re.MULTILINE))

    @cached_property
    def chat_template(self) -> str:
        """The tokenizer's chat template; empty without one."""
        return self.text("chat_template.jinja") or str(self.json("tokenizer_config.json").get("chat_template") or "")

    @cached_property
    def code(self) -> str:
        """The file that names Python code in the folder which transformers or the library would run; else empty."""
        for name in ("config.json", "tokenizer_config.json"):
            if self.json(name).get("auto_map"):
                return name
        packages = {row["type"].split(".")[0] for row in self.modules}
        if any(self.has(f"{package}.py") for package in packages):
            return "modules.json"
        sides = _SIDE_FOLDERS if self.has(_SIDES) else ()
        return next((f"{side}/{code}" for side in sides if (code := ModelFolder(self.path / side).code)), "")

    @cached_property
    def family(self) -> Family:
        """What kind of model it is."""
        return _of_library(self) or _of_config(self)

    def text(self, name: str) -> str:
        """A text file in the folder."""
        try:
            return (self.path / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def library_module(full: str) -> str:
    """The name of a module's class where it is one of sentence-transformers' own for embedders; else the full name.

    `sentence_transformers.models.Dense` and `sentence_transformers.base.modules.dense.Dense` are the same "Dense";
    `pylate.models.Dense.Dense` and `custom_st.Transformer` are others.
    """
    parts = full.split(".")
    others = ("sparse_encoder", "cross_encoder", "multi_vector_encoder")
    own = parts[0] == "sentence_transformers" and not any(part in others for part in parts)
    return parts[-1] if own else full


#: The `model_type` of the causal rerankers that put pairs into known words where their files do not say which; and the
#: code that zerank was published with, before its files did.
PAIR_WORDS = ("qwen2", "qwen3")
ZERANK_CODE = "modeling_zeranker.py"
#: Of a classifier with a general chat template, which no tool can read a pair by.
NO_PAIRS = "its chat template writes no pair, so that nothing says how one is read"
#: The tags of a model card that say that a masked language model was trained as a SPLADE, and the files of those of
#: OpenSearch whose queries are read by a table of weights.
_SPARSE_TAGS = ("splade", "sparse-encoder", "learned sparse")
_QUERY_TABLES = ("idf.json", "query_token_weights.txt")
#: The classes of sentence-transformers that config_sentence_transformers.json names, and the family of each.
_LIBRARY_CLASSES = {
    "SparseEncoder": "sparse",
    "CrossEncoder": "cross-encoder",
    "MultiVectorEncoder": "late-interaction",
    "ColBERT": "late-interaction",
}
#: A module by the last part of its name, and the family of the model that has it.
_MODULES = {
    "MultiVectorMask": "late-interaction",
    "LogitScore": "causal-reranker",
    "Router": "router",
    "Asym": "router",
    "SpladePooling": "sparse",
    "SparseStaticEmbedding": "sparse",
    "SparseAutoEncoder": "sparse",
    "CSRSparsity": "sparse",
    "StaticEmbedding": "static",
}


def _of_library(folder: ModelFolder) -> Family | None:
    """The family by the files of sentence-transformers and of PyLate; None without any."""
    kinds = [str(row["type"]) for row in folder.modules]
    last = {kind.split(".")[-1]: kind for kind in reversed(kinds)}
    if pylate := [kind for kind in kinds if kind.startswith("pylate.")]:
        return Family("late-interaction", f"modules.json: {pylate[0]}")
    for name, family in _MODULES.items():
        if name in last:
            return Family(family, f"modules.json: {last[name]}")
    declared = folder.library.get("model_type")
    if declared in _LIBRARY_CLASSES:
        family = _LIBRARY_CLASSES[declared]
        if family == "cross-encoder":
            if asked := _asks_in_words(folder):
                return asked
            if _has(folder, "ForCausalLM"):
                family = "causal-reranker"
        evidence = f"config_sentence_transformers.json: model_type {declared}"
        return Family(family, evidence + (_unsaid(folder) if family == "cross-encoder" else ""))
    if "HF_ColBERT" in folder.architectures or not kinds:
        return None
    return Family("dense", f"modules.json: {', '.join(kind.split('.')[-1] for kind in kinds)}")


def _of_config(folder: ModelFolder) -> Family:
    """The family by config.json and by the files beside it."""
    names = ", ".join(folder.architectures) or f"model_type {folder.model_type}"
    evidence = f"config.json: {names}"
    if "HF_ColBERT" in folder.architectures:
        return Family("late-interaction", evidence)
    if folder.has("artifact.metadata"):
        return Family("late-interaction", "artifact.metadata")
    if not folder.config:
        found = "lora" if folder.has("adapter_config.json") else "unknown"
        return Family(found, "adapter_config.json" if found == "lora" else "neither config.json nor modules.json")
    if folder.model_type == "model2vec":
        return Family("static", "config.json: model_type model2vec")
    if asked := _asks_in_words(folder):
        return asked
    if _has(folder, "ForSequenceClassification"):
        labels = _labels(folder.config)
        if labels == 1:
            return Family("cross-encoder", evidence + _unsaid(folder))
        return Family("classifier", f"{evidence}, {labels} labels")
    if _has(folder, "LayerWise"):
        return Family("ranking-lm", evidence)
    if _has(folder, "ForCausalLM"):
        tag = folder.card.get("pipeline_tag", "")
        ranks = tag in ("text-ranking", "text-classification")
        return Family("ranking-lm", f"{evidence}; README.md: {tag}") if ranks else Family("causal-lm", evidence)
    if _has(folder, "ForMaskedLM") and (said := query_table(folder) or _sparse_tag(folder)):
        return Family("sparse", f"{evidence}; {said}")
    if folder.config.get("is_encoder_decoder") and not _has(folder, "EncoderModel"):
        return Family("encoder-decoder", evidence)
    if _has(folder, "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"):
        return Family("classifier", evidence)
    return Family("body", evidence)


def query_table(folder: ModelFolder) -> str:
    """The file of weights by which the queries of a sparse encoder are read; empty without one."""
    return next((name for name in _QUERY_TABLES if folder.has(name)), "")


def _asks_in_words(folder: ModelFolder) -> Family | None:
    """A model whose files, or whose kin, say into which words a pair is put; None where nothing does."""
    if not _has(folder, "ForCausalLM", "ForSequenceClassification"):
        return None
    found = ""
    template = folder.chat_template
    if folder.has(ZERANK_CODE):
        found = ZERANK_CODE
    elif all(f'"{role}"' in template or f"'{role}'" in template for role in ("query", "document")):
        found = "its chat template writes the roles 'query' and 'document'"
    elif _has(folder, "ForCausalLM") and folder.model_type in PAIR_WORDS:
        ranks = folder.card.get("pipeline_tag") == "text-ranking" and "\n- ultrarag" not in folder.card_head
        # our own cards say so of whatever an adapter made of such a model
        found = f"config.json: {folder.architectures[0]}; README.md: text-ranking" if ranks else ""
    return Family("causal-reranker", found) if found else None


def _sparse_tag(folder: ModelFolder) -> str:
    """The tag of the model card that says that it is a learned sparse encoder; empty without one."""
    tags = re.findall(r"^[ \t]*-[ \t]+['\"]?([^'\"\n]+?)['\"]?[ \t]*$", folder.card_head, flags=re.MULTILINE)
    found = next((tag for tag in tags if tag.lower() in _SPARSE_TAGS), "")
    return f"README.md: {found}" if found else ""


def _unsaid(folder: ModelFolder) -> str:
    """What is said of a classifier whose chat template writes no pairs: whoever reads one by it reads neither text."""
    return f"; {NO_PAIRS}" if folder.chat_template else ""


def _has(folder: ModelFolder, *parts: str) -> bool:
    return any(part in name for name in folder.architectures for part in parts)


def _labels(config: dict[str, Any]) -> int:
    """The number of labels, of which transformers writes the names where there are not two."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else int(config.get("num_labels") or 2)
