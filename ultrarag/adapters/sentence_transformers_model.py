"""A model of the sentence-transformers library as one of ours: its modules, its tokenizer, its prompts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.adapters.embedder import first_dimensions, padded_right
from ultrarag.adapters.embedder_files import refuse_first_token
from ultrarag.adapters.sentence_transformers_files import prompts_of, read_model_config
from ultrarag.errors import CheckpointError, UsageError
from ultrarag.tokenizer_limits import keep_limits
from ultrarag.types import Embeddings, EncoderSettings, Sparse

if TYPE_CHECKING:
    from ultrarag.hookspecs import Features, LoadOptions

#: What a Router calls our kinds; a text of a symmetric task takes its default route.
_TASKS = {"query": "query", "passage": "document", "text": None}
#: The module of a route that reads its texts without special tokens, by a weight for each token.
_STATIC = "SparseStaticEmbedding"
#: A tokenizer without a real limit says some 1e30.
_NO_LIMIT = 1 << 30


class SentenceTransformersModel(nn.Module):
    """The modules of a SentenceTransformer or SparseEncoder; state-dict keys: `backbone.*` and `modules_after.*`."""

    def __init__(self, library_model: Any, settings: EncoderSettings) -> None:
        super().__init__()
        first, *rest = list(library_model)
        self.backbone = first
        self.modules_after = nn.ModuleList(rest)
        self.settings = settings
        self.tokenizer = library_model.tokenizer
        #: special tokens that stand before and behind a text
        self.around = special_tokens(self.tokenizer)
        # in a tuple, so that its parameters, which are the ones above, are not registered a second time
        self._library = (library_model,)
        self._unused = [pair for module in modules_of(library_model) for pair in _take_pooler(module)]

    @property
    def config(self) -> Any:
        """The transformers configuration of the passages' backbone."""
        return transformers_of(self.library_model)[-1].auto_model.config

    @property
    def library_model(self) -> Any:
        """The SentenceTransformer or SparseEncoder that owns the same modules."""
        return self._library[0]

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
        for module in modules_of(self.library_model):
            if type(module).__name__ == "SpladePooling":
                # Its evaluation mode, which computes the same, overwrites what a backward would need.
                module.training = torch.is_grad_enabled()
        for module in (self.backbone, *self.modules_after):
            if not is_router(module):
                state = module(state)
                continue
            if reads_plainly(module, kind):
                state["attention_mask"] = self._without_special_tokens(state["attention_mask"])
            state = module(state, task=_TASKS[kind])
        vector = state["sentence_embedding"]
        if self.settings.heads == ("sparse",):
            return Embeddings(sparse=nonzero(vector))
        if self.settings.truncate_dim is None:
            return Embeddings(dense=vector)
        vector = first_dimensions(vector, self.settings.truncate_dim)
        return Embeddings(dense=F.normalize(vector, dim=-1) if self.settings.normalize else vector)

    def _without_special_tokens(self, mask: Tensor) -> Tensor:
        """An attention mask, (batch, tokens), that hides them; the texts' tokens stand on the left."""
        before, behind = self.around
        place = mask.cumsum(1)
        return mask * (place > before) * (place <= mask.sum(1, keepdim=True) - behind)

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


def is_router(module: Any) -> bool:
    """Whether a module sends queries and passages different ways."""
    return hasattr(module, "sub_modules") and hasattr(module, "default_route")


def route_of(router: Any, kind: str) -> str:
    """The route of texts of a kind."""
    task = _TASKS[kind]
    return str(router.default_route if task is None else router.route_mappings.get((task, None), task))


def reads_plainly(router: Any, kind: str) -> bool:
    """Whether the route of a kind reads texts without special tokens."""
    return type(router.sub_modules[route_of(router, kind)][0]).__name__ == _STATIC


def modules_of(library_model: Any) -> list[Any]:
    """The modules in order, those of a Router's routes in its place: queries' first, passages' last."""
    found: list[Any] = []
    for module in library_model:
        if not is_router(module):
            found.append(module)
            continue
        last = route_of(module, "passage")
        for name in sorted(module.sub_modules, key=lambda name: name == last):
            found.extend(module.sub_modules[name])
    return found


def transformers_of(library_model: Any) -> list[Any]:
    """The modules that run a transformers model, the passages' last."""
    return [module for module in modules_of(library_model) if getattr(module, "auto_model", None) is not None]


def special_tokens(tokenizer: Any) -> tuple[int, int]:
    """How many special tokens stand before and behind a text."""
    with keep_limits(tokenizer):
        plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(tokenizer("a")["input_ids"])
    starts = range(len(whole) - len(plain) + 1)
    before = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return before, len(whole) - len(plain) - before


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
        raise CheckpointError(
            f"{folder} has no modules.json, so it is no checkpoint of sentence-transformers; "
            "use the adapter 'bge' for a plain transformers encoder"
        )
    library_model = _library_class(folder)(
        str(folder), device="cpu", trust_remote_code=options.trust_remote_code, model_kwargs={"dtype": "float32"}
    )
    sparse = type(library_model).__name__ == "SparseEncoder"
    _check_modules(library_model, folder)
    normalize = _normalized(library_model, sparse, options, folder)
    settings = _settings(library_model, "sparse" if sparse else "dense", normalize, folder)
    _check_heads(settings, options, folder)
    return SentenceTransformersModel(library_model, settings)


def save_model(model: SentenceTransformersModel, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write with the library's own save, with the prompts of the model's settings."""
    holder = _holding(model, state_dict)
    with holder.complete() as library_model:
        library_model.prompts = prompts_of(holder.settings)
        library_model.truncate_dim = holder.settings.truncate_dim
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
        modules = (folder / "modules.json").read_text(encoding="utf-8")
        kind = "SparseEncoder" if ".sparse_encoder." in modules else "SentenceTransformer"
    if kind not in ("SentenceTransformer", "SparseEncoder"):
        raise CheckpointError(
            f"{folder} is a {kind}, which this adapter does not run (SentenceTransformer, SparseEncoder)"
        )
    return getattr(library, kind)


def _check_modules(library_model: Any, folder: Path) -> None:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    for router in filter(is_router, library_model):
        _check_router(router, folder)
    for module in modules_of(library_model):
        if "cls" in (getattr(module, "pooling_mode", None) or ()):
            for owner in transformers_of(library_model):
                refuse_first_token(owner.auto_model, folder)
        if getattr(module, "include_prompt", True) is False:
            raise CheckpointError(
                f"{folder}: pooling that leaves the prompt out (include_prompt false) is not supported"
            )
    for module in _first_modules(library_model):
        if not isinstance(getattr(module, "auto_model", None), PreTrainedModel) and type(module).__name__ != _STATIC:
            raise CheckpointError(f"{folder}: the first module is '{type(module).__name__}', not a transformers model")
    if not transformers_of(library_model):
        raise CheckpointError(f"{folder}: none of its modules is a transformers model")
    if not isinstance(library_model.tokenizer, PreTrainedTokenizerBase):
        raise CheckpointError(
            f"{folder}: its tokenizer is a {type(library_model.tokenizer).__name__}, not transformers'"
        )


def _first_modules(library_model: Any) -> list[Any]:
    """What reads texts: the first module, or that of each route."""
    first = library_model[0]
    return [route[0] for route in first.sub_modules.values()] if is_router(first) else [first]


def _check_router(router: Any, folder: Path) -> None:
    missing = [route for kind in ("query", "passage") if (route := route_of(router, kind)) not in router.sub_modules]
    if missing:
        raise CheckpointError(
            f"{folder}: its Router has the routes {', '.join(router.sub_modules)}, and none called '{missing[0]}': "
            "queries and passages take the routes 'query' and 'document'"
        )
    if any(modality is not None for _, modality in router.route_mappings):
        raise CheckpointError(f"{folder}: its Router goes by modality, and only texts are read here")
    if any(is_router(module) for route in router.sub_modules.values() for module in route):
        raise CheckpointError(f"{folder}: a Router within a Router is not supported")
    tokenizers = [found for route in router.sub_modules.values() if (found := getattr(route[0], "tokenizer", None))]
    if any(found.get_vocab() != tokenizers[0].get_vocab() for found in tokenizers[1:]):
        raise CheckpointError(f"{folder}: the routes of its Router have different tokenizers, which is not supported")


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


def _settings(library_model: Any, head: str, normalize: bool, folder: Path) -> EncoderSettings:
    return EncoderSettings(
        heads=(head,),
        normalize=normalize,
        query_max_length=_max_length(library_model, "query"),
        passage_max_length=_max_length(library_model, "passage"),
        **read_model_config(folder).settings(),
    )


def _max_length(library_model: Any, kind: str) -> int | None:
    """The longest text of a kind in tokens, special ones included."""
    reader, plain = library_model[0], False
    if is_router(reader):
        plain = reads_plainly(reader, kind)
        reader = reader.sub_modules[route_of(reader, kind)][0]
    length = reader.max_seq_length
    if not length or length >= _NO_LIMIT:
        return None
    return int(length) + (sum(special_tokens(library_model.tokenizer)) if plain else 0)


def _check_heads(settings: EncoderSettings, options: LoadOptions, folder: Path) -> None:
    missing = [head for head in options.heads or () if head not in settings.heads]
    if missing:
        raise CheckpointError(f"{folder} has no head '{missing[0]}': this model is {settings.heads[0]}")
