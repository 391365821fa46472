"""A model of the sentence-transformers library as one of ours: its modules, its tokenizer, its prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.adapters.embedder import first_dimensions, padded_right
from ultrarag.adapters.embedder_files import refuse_first_token
from ultrarag.adapters.sentence_transformers_files import prompts_of, read_model_config
from ultrarag.adapters.sentence_transformers_routes import (
    TASKS,
    VECTORS,
    WEIGHTS,
    Reader,
    as_bags,
    check_router,
    first_modules,
    is_router,
    kinds_of,
    modules_of,
    reader_of,
    route_of,
    transformers_of,
    without_empty,
)
from ultrarag.claims import ModelFolder, query_table
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.types import Embeddings, EncoderSettings, Kind, Sparse

if TYPE_CHECKING:
    from ultrarag.hookspecs import Features, LoadOptions


class SentenceTransformersModel(nn.Module):
    """The modules of a SentenceTransformer or SparseEncoder; state-dict keys: `backbone.*` and `modules_after.*`."""

    def __init__(self, library_model: Any, settings: EncoderSettings, readers: Mapping[Kind, Reader]) -> None:
        super().__init__()
        first, *rest = list(library_model)
        self.backbone = first
        self.modules_after = nn.ModuleList(rest)
        self.settings = settings
        self._readers = dict(readers)
        #: that of passages
        self.tokenizer = self._readers["passage"].tokenizer
        # in a tuple, so that its parameters, which are the ones above, are not registered a second time
        self._library = (library_model,)
        for module in modules_of(library_model):
            if type(module).__name__ == "SpladePooling" and module.pooling_strategy == "max":
                module.forward = partial(pool_first, module)
        self._unused = [pair for module in modules_of(library_model) for pair in _take_pooler(module)]

    @property
    def route_tokenizers(self) -> tuple[Any, ...]:
        """The tokenizers of all routes, on which vectors depend beside that of passages."""
        plain = [reader.tokenizer for reader in self._readers.values() if type(reader.body).__name__ == VECTORS]
        own = [tokenizer for body in first_modules(self.library_model) if (tokenizer := _transformers_tokenizer(body))]
        return (*own, *plain)

    @property
    def config(self) -> Any:
        """The transformers configuration of the passages' backbone."""
        return transformers_of(self.library_model)[-1].auto_model.config

    @property
    def library_model(self) -> Any:
        """The SentenceTransformer or SparseEncoder that owns the same modules."""
        return self._library[0]

    def text_reader(self, kind: Kind) -> Reader:
        """What reads the texts of a kind."""
        return self._readers.get(kind, self._readers["passage"])

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """How the names of parameters begin that the checkpoint declares frozen: they are never trained."""
        return tuple(f"{name}." for name, module in self.named_modules() if getattr(module, "frozen", False) is True)

    def unread_prefixes(self, kind: str) -> tuple[str, ...]:
        """How the names of the modules begin that texts of a kind do not pass: those of a Router's other routes."""
        return tuple(
            f"{name}.sub_modules.{other}."
            for name, router in self.named_modules()
            if is_router(router)
            for other in router.sub_modules
            if other != route_of(router, kind)
        )

    def encode(self, features: Features) -> Embeddings:
        """Run the modules in order; the sparse head is the nonzero part of a sparse encoder's vector."""
        features = padded_right(features)
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in features]
        state: dict[str, Any] = {name: features[name] for name in names}
        kind = features.get("kind", "passage")
        self._prepare(state, self.text_reader(kind))
        for module in modules_of(self.library_model):
            if type(module).__name__ == "SpladePooling":
                # Its evaluation mode, which computes the same, overwrites what a backward would need.
                module.training = torch.is_grad_enabled()
        for module in (self.backbone, *self.modules_after):
            state = module(state, task=TASKS[kind]) if is_router(module) else module(state)
        vector = state["sentence_embedding"]
        if self.settings.heads == ("sparse",):
            return Embeddings(sparse=nonzero(vector))
        if self.settings.truncate_dim is None:
            return Embeddings(dense=vector)
        vector = first_dimensions(vector, self.settings.truncate_dim)
        return Embeddings(dense=F.normalize(vector, dim=-1) if self.settings.normalize else vector)

    def _prepare(self, state: dict[str, Any], reader: Reader) -> None:
        """Give a table what it reads: a text without tokens as such, and vectors for flat ids."""
        if type(reader.body).__name__ not in (WEIGHTS, VECTORS):
            return
        ids, mask = state["input_ids"], state["attention_mask"]
        state["attention_mask"] = without_empty(ids, mask, reader.tokenizer.pad_token_id)
        if type(reader.body).__name__ == VECTORS:
            state |= as_bags(ids, state["attention_mask"])

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in backward (--gradient_checkpointing)."""
        for module in transformers_of(self.library_model):
            module.auto_model.activation_checkpointing_enable(**options)

    @contextmanager
    def complete(self) -> Iterator[Any]:
        """Yield the library's model with the parts that were set aside at loading, as its files have them."""
        for owner, module in self._unused:
            owner.pooler = module
        try:
            yield self.library_model
        finally:
            for owner, _ in self._unused:
                owner.pooler = None


def _transformers_tokenizer(body: Any) -> Any:
    """What a module reads texts with, unless it is a tokenizer of the library `tokenizers`."""
    return body.tokenizer if hasattr(body.tokenizer, "special_tokens_map") else None


def pool_first(module: Any, features: dict[str, Any]) -> dict[str, Any]:
    """SpladePooling by the maximum, taken before the activation: the same weights, for both rise with the logit.

    The activation then has one value for each token of the vocabulary, not one at each place of the text, and backward
    keeps no more. Texts of 128 tokens take a fifth less time by the model of `benchmarks/splade.py`.
    """
    logits = features["token_embeddings"]
    weights = (logits * features["attention_mask"].unsqueeze(-1).to(logits.dtype)).amax(dim=1).relu().log1p()
    features["sentence_embedding"] = weights.log1p() if module.activation_function == "log1p_relu" else weights
    return features


def nonzero(vector: Tensor) -> Sparse:
    """The positive entries of (batch, dim) vectors, as wide as the fullest row; differentiable in the weights."""
    positive = vector.detach() > 0
    width = max(1, int(positive.sum(1).max()))
    ids = (~positive).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    there = positive.gather(1, ids)
    return Sparse(torch.where(there, ids, Sparse.PAD_ID), vector.gather(1, ids) * there)


def _take_pooler(first: nn.Module) -> list[tuple[Any, nn.Module]]:
    """Set aside BERT's pooler where token vectors are pooled: it computes for nothing and gets no gradient."""
    if getattr(first, "module_output_name", None) != "token_embeddings":
        return []
    owners: list[Any] = [m for m in first.modules() if isinstance(getattr(m, "pooler", None), nn.Module)]
    found = [(owner, owner.pooler) for owner in owners]
    for owner in owners:
        owner.pooler = None
    return found


def load_model(path: str, options: LoadOptions) -> SentenceTransformersModel:
    """Load with the library's own classes.

    Raises:
        CheckpointError: no checkpoint of that library, or one whose modules cannot be run behind our hooks.
        UsageError: an option that contradicts what the modules do.
    """
    folder = Path(path)
    if not (folder / "modules.json").is_file():
        _check_masked_language_model(folder, options)
    declared = read_model_config(folder)
    library_model = _library_class(folder)(
        str(folder), device="cpu", trust_remote_code=options.trust_remote_code, model_kwargs={"dtype": "float32"}
    )
    sparse = type(library_model).__name__ == "SparseEncoder"
    _check_modules(library_model, sparse, folder)
    normalize = _normalized(library_model, sparse, options, folder)
    readers = {kind: reader_of(library_model, kind, folder) for kind in kinds_of(library_model)}
    settings = EncoderSettings(
        heads=("sparse" if sparse else "dense",),
        normalize=normalize,
        query_max_length=readers["query"].max_length,
        passage_max_length=readers["passage"].max_length,
        **declared.settings(),
    )
    if sparse:  # also what a SparseAutoEncoder keeps
        settings.max_active_dims = library_model.max_active_dims
    _check_heads(settings, options, folder)
    return SentenceTransformersModel(library_model, settings, readers)


def _check_masked_language_model(folder: Path, options: LoadOptions) -> None:
    """Refuse a folder without modules that is not to be read as a SPLADE, or that holds half of a model only.

    Raises:
        CheckpointError: says what to do.
    """
    if table := query_table(ModelFolder(folder)):
        raise CheckpointError(
            f"{folder}: its queries are read by a table ({table}), and without modules.json nothing says how its "
            "documents are; save it by sentence-transformers, with a Router of a SparseStaticEmbedding and the model"
        )
    found = ModelFolder(folder)
    masked = any("ForMaskedLM" in name for name in found.architectures)
    if masked and (found.family.name == "sparse" or options.heads == ("sparse",)):
        return
    raise CheckpointError(
        f"{folder} has no modules.json, so it is no checkpoint of sentence-transformers; use the adapter 'bge' for a "
        "plain transformers encoder"
        + (", or ask for a SPLADE of this masked language model (heads=('sparse',), --heads sparse)" if masked else "")
    )


def save_model(model: SentenceTransformersModel, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write with the library's own save, with the prompts of the model's settings."""
    holder = _holding(model, state_dict)
    with holder.complete() as library_model:
        library_model.prompts = prompts_of(holder.settings)
        library_model.truncate_dim = holder.settings.truncate_dim
        if holder.settings.heads == ("sparse",):
            library_model.max_active_dims = holder.settings.max_active_dims
        library_model.save_pretrained(path, create_model_card=False)


def _holding(model: SentenceTransformersModel, state_dict: Mapping[str, Any]) -> SentenceTransformersModel:
    """The model itself when `state_dict` is its own weights, else a copy that holds them (gathered, or merged)."""
    own = model.state_dict()
    if all(name in own and tensor.data_ptr() == own[name].data_ptr() for name, tensor in state_dict.items()):
        return model
    holder = copy.deepcopy(model).cpu()
    holder.load_state_dict(dict(state_dict), strict=True)
    return holder


def _library_class(folder: Path) -> Any:
    """SparseEncoder where the checkpoint says so, or its modules do."""
    import sentence_transformers as library

    file = folder / "config_sentence_transformers.json"
    kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    if kind is None:
        modules = folder / "modules.json"
        sparse = not modules.is_file() or ".sparse_encoder." in modules.read_text(encoding="utf-8")
        kind = "SparseEncoder" if sparse else "SentenceTransformer"
    if kind not in ("SentenceTransformer", "SparseEncoder"):
        raise CheckpointError(
            f"{folder} is a {kind}, which this adapter does not run (SentenceTransformer, SparseEncoder)"
        )
    return getattr(library, kind)


def _check_modules(library_model: Any, sparse: bool, folder: Path) -> None:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    for router in filter(is_router, library_model):
        check_router(router, sparse, folder)
    for module in modules_of(library_model):
        if "cls" in (getattr(module, "pooling_mode", None) or ()):
            for owner in transformers_of(library_model):
                refuse_first_token(owner.auto_model, folder)
        if getattr(module, "include_prompt", True) is False:
            raise CheckpointError(
                f"{folder}: pooling that leaves the prompt out (include_prompt false) is not supported"
            )
    for module in first_modules(library_model):
        if type(module).__name__ in (WEIGHTS, VECTORS):
            continue
        if not isinstance(getattr(module, "auto_model", None), PreTrainedModel):
            raise CheckpointError(f"{folder}: the first module is '{type(module).__name__}', not a transformers model")
        if not isinstance(module.tokenizer, PreTrainedTokenizerBase):
            raise CheckpointError(f"{folder}: its tokenizer is a {type(module.tokenizer).__name__}, not transformers'")
    if not transformers_of(library_model):
        raise CheckpointError(f"{folder}: none of its modules is a transformers model")


def _normalized(library_model: Any, sparse: bool, options: LoadOptions, folder: Path) -> bool:
    """Whether the vectors have unit length; a Normalize module is added where that is asked for and missing."""
    if options.pooling is not None:
        raise UsageError(
            f"sentence_pooling_method '{options.pooling}' cannot be set: pooling is one of the modules of {folder}"
        )
    if sparse:
        return False
    ends = [list(route) for module in library_model if is_router(module) for route in module.sub_modules.values()]
    ends = [[*end, *list(library_model)] for end in ends or [[]]]  # what each text goes through
    present = all(any(type(module).__name__ == "Normalize" for module in end) for end in ends)
    if present and options.normalize is False:
        raise UsageError(f"normalize_embeddings False contradicts the module Normalize of {folder}")
    if options.normalize and not present:
        from sentence_transformers.base.modules import Normalize

        library_model.append(Normalize())
    return present or bool(options.normalize)


def _check_heads(settings: EncoderSettings, options: LoadOptions, folder: Path) -> None:
    missing = [head for head in options.heads or () if head not in settings.heads]
    if missing:
        raise CheckpointError(f"{folder} has no head '{missing[0]}': this model is {settings.heads[0]}")
