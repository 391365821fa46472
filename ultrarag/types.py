"""The things that pass between the parts: Embeddings, EncoderSettings, Example, Passage, Hit.

Nothing here imports torch: an `Embeddings` holds torch tensors in training and numpy arrays in serving, and
works on both through the operators that they share.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal

import numpy as np

from ultrarag.errors import UsageError

#: What a text is to the model; some models prefix queries or passages with an instruction, or encode them differently.
#: "text": neither, as in a symmetric task (similarity, clustering), where all texts are read alike.
Kind = Literal["query", "passage", "text"]
KINDS: tuple[Kind, ...] = ("query", "passage", "text")

#: The part of a prompt of passages that a passage's title takes the place of.
NO_TITLE = "title: none"

#: The heads a model may have, in the order in which they are reported.
HEADS = ("dense", "sparse", "colbert", "scores")


@dataclass
class Sparse:
    """Lexical weights of a batch: each row lists distinct token ids in ascending order, padded at the end."""

    #: (batch, tokens) int64; PAD_ID where a row has fewer distinct ids than the longest
    ids: Any
    #: (batch, tokens) float; 0 where `ids` is PAD_ID
    weights: Any

    PAD_ID = -1

    def to_dicts(self) -> list[dict[int, float]]:
        """Return one `{token id: weight}` per row, without the zero weights."""
        ids, weights = _numpy(self.ids), _numpy(self.weights)
        return [
            {int(i): float(w) for i, w in zip(row_ids, row_weights, strict=True) if i >= 0 and w > 0}
            for row_ids, row_weights in zip(ids, weights, strict=True)
        ]


@dataclass
class Embeddings:
    """What an adapter makes of a batch of texts: one optional field per head, equal in their first dimension.

    Fields are torch tensors while training (differentiable) and numpy arrays when they come from
    `Encoder.encode`.
    """

    #: (batch, dim)
    dense: Any = None
    #: token ids and weights, each (batch, tokens)
    sparse: Sparse | None = None
    #: (batch, tokens, dim); zero where `mask` is 0
    colbert: Any = None
    #: (batch, tokens): 1 for the tokens that `colbert` holds, 0 for padding
    mask: Any = None
    #: (batch,): a cross-encoder's relevance of each (query, passage) pair; (batch, layers) while a layerwise one trains
    scores: Any = None

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that are present."""
        return tuple(name for name in HEADS if getattr(self, name) is not None)

    def __len__(self) -> int:
        for array in self.arrays():
            return int(array.shape[0])
        return 0

    def arrays(self) -> Iterator[Any]:
        """Yield every array held, in a fixed order."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Sparse):
                yield value.ids
                yield value.weights
            elif value is not None:
                yield value

    def map(self, function: Callable[[Any], Any]) -> Embeddings:
        """Return Embeddings with `function` applied to every array held."""
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Sparse):
                changes[item.name] = Sparse(function(value.ids), function(value.weights))
            elif value is not None:
                changes[item.name] = function(value)
        return replace(self, **changes)

    def __getitem__(self, index: Any) -> Embeddings:
        """Return the rows that `index` (a slice, or an array of row numbers) selects."""
        if isinstance(index, int):
            raise TypeError("index Embeddings with a slice or an array of row numbers, not one integer")
        return self.map(lambda array: array[index])

    def to(self, *args: Any, **kwargs: Any) -> Embeddings:
        """Move torch tensors as `Tensor.to` does; integer ids keep their dtype."""

        def move(tensor: Any) -> Any:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            return tensor.to(**{k: v for k, v in kwargs.items() if k != "dtype"}) if kwargs else tensor

        return self.map(move)

    def detach(self) -> Embeddings:
        """Return the same tensors cut from the graph."""
        return self.map(lambda tensor: tensor.detach())

    def numpy(self) -> Embeddings:
        """Return numpy arrays (floats as float32)."""
        return self.map(_numpy)

    @staticmethod
    def cat(parts: Sequence[Embeddings]) -> Embeddings:
        """Concatenate along the batch; token dimensions are padded to the longest part.

        Raises:
            ValueError: when `parts` is empty or the parts hold different heads.
        """
        if not parts:
            raise ValueError("cannot concatenate no Embeddings")
        if len({part.heads for part in parts}) > 1:
            raise ValueError(f"parts hold different heads: {[part.heads for part in parts]}")
        first = parts[0]
        return Embeddings(
            dense=None if first.dense is None else _cat([p.dense for p in parts]),
            sparse=None
            if first.sparse is None
            else Sparse(
                _cat_padded([p.sparse.ids for p in parts], Sparse.PAD_ID),  # type: ignore[union-attr]
                _cat_padded([p.sparse.weights for p in parts], 0),  # type: ignore[union-attr]
            ),
            colbert=None if first.colbert is None else _cat_padded([p.colbert for p in parts], 0),
            mask=None if first.mask is None else _cat_padded([p.mask for p in parts], 0),
            scores=None if first.scores is None else _cat([p.scores for p in parts]),
        )


@dataclass
class Tokens:
    """Token ids of some texts, or of (query, passage) pairs, not yet padded."""

    ids: list[list[int]]
    #: how many were longer than the limit
    truncated: int = 0
    #: the segment of each token (0 or 1), for models that tell a pair's query from its passage; else None
    types: list[list[int]] | None = None
    #: what the texts are; None for pairs
    kind: Kind | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class EncoderSettings:
    """What turns hidden states into vectors besides the weights; part of the manifest and of the fingerprint.

    An adapter's `load` may set `model.settings` to what the checkpoint declares; None means undeclared.
    """

    #: the heads whose weights are there
    heads: tuple[str, ...] = ("dense",)
    #: cls, mean, last_token or weighted_mean
    pooling: str | None = None
    #: dense and ColBERT vectors have unit length
    normalize: bool | None = None
    query_instruction: str = ""
    #: `str.format` template of instruction and query
    query_format: str = "{}{}"
    #: `str.format` template of a query that has no instruction
    query_plain_format: str = "{}"
    passage_instruction: str = ""
    passage_format: str = "{}{}"
    #: tokens, special ones included; longer texts are cut, and counted
    query_max_length: int | None = None
    #: for a cross-encoder: of the whole (query, passage) pair
    passage_max_length: int | None = None
    #: a language model that reranks: the question put to it after the pair
    prompt: str | None = None
    #: a language model that reranks: what stands between query, passage and prompt
    separator: str | None = None
    #: a layerwise reranker: the layer whose score counts; None: the last one
    cutoff_layer: int | None = None
    #: dense vectors are cut to so many dimensions, and given unit length again where `normalize` is set; None: whole
    truncate_dim: int | None = None
    #: of each text's lexical weights only so many are kept, the greatest, when it is encoded; None: all
    max_active_dims: int | None = None
    #: of a passage's token vectors about so many are merged to one when it is encoded; None: none
    token_pooling: int | None = None
    #: what the checkpoint declares for other tools, by name: kept when it is saved, used nowhere here
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    #: how other tools compare its vectors: cosine, dot, euclidean or manhattan
    similarity: str | None = None

    def render(self, text: str | Passage, kind: Kind, instruction: str | None = None) -> str:
        """Return `text` with the instruction of its kind (or `instruction`) in the declared format.

        A text of a symmetric task has an instruction only where one is given, in the format of queries.
        """
        if isinstance(text, Passage):
            return self._render_passage(text, kind, instruction)
        if kind == "text":
            return self.query_format.format(instruction, text) if instruction else text
        declared = self.query_instruction if kind == "query" else self.passage_instruction
        template = self.query_format if kind == "query" else self.passage_format
        chosen = declared if instruction is None else instruction
        if chosen:
            return template.format(chosen, text)
        return self.query_plain_format.format(text) if kind == "query" else text

    def _render_passage(self, passage: Passage, kind: Kind, instruction: str | None) -> str:
        """A title stands where the prompt of passages has a place for it, as EmbeddingGemma's; else before the text."""
        prompt = self.passage_instruction if instruction is None else instruction
        if kind != "passage" or NO_TITLE not in prompt or is_blank(passage.title):
            return self.render(passage.content, kind, instruction)
        return self.passage_format.format(prompt.replace(NO_TITLE, f"title: {passage.title}", 1), passage.text)

    def max_length(self, kind: Kind) -> int | None:
        """Return the token limit of texts of this kind."""
        return self.query_max_length if kind == "query" else self.passage_max_length

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "heads": list(self.heads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSettings:
        """Read what `to_dict` wrote; unknown names are an error (the manifest is from a newer version)."""
        return cls(**{**values, "heads": tuple(values.get("heads", ("dense",)))})


@dataclass(frozen=True)
class Example:
    """One validated row of training data."""

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...] = ()
    #: teacher's scores, as long as `pos` / `neg`
    pos_scores: tuple[float, ...] | None = None
    neg_scores: tuple[float, ...] | None = None
    #: instruction for this row's query, in place of the run's
    prompt: str | None = None
    type: str = "normal"
    #: "file:line" it was read from
    source: str = ""


@dataclass(frozen=True)
class Passage:
    """A text of the corpus."""

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What is encoded: title, newline, text; the text alone where there is no title."""
        return f"{self.title}\n{self.text}" if self.title else self.text

    @property
    def encodable(self) -> str | Passage:
        """What an encoder is given: its text, or itself where it has a title, which the model's prompt may place."""
        return self if self.title else self.text

    @property
    def blank(self) -> bool:
        """Neither title nor text has a visible character: it says nothing, and vectors put it near short queries."""
        return is_blank(self.title) and is_blank(self.text)


def text_of(item: str | Passage) -> str:
    """The text that words are searched in, and hashes taken of: a passage's `content`."""
    return item if isinstance(item, str) else item.content


@dataclass(frozen=True)
class Hit:
    """A passage found for a query."""

    id: str
    score: float
    passage: Passage
    #: the score of each head (or retriever) before fusion
    scores: Mapping[str, float] = field(default_factory=dict)


#: Characters that Unicode counts as letters, marks or symbols and that show nothing: fillers and variation selectors.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0").union(map(chr, range(0xFE00, 0xFE10)))


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character: only spaces, line breaks, controls, zero-width characters."""
    return not any(_is_visible(character) for character in text)


def _is_visible(character: str) -> bool:
    # separators, controls and format characters; an unassigned character may be a newer Unicode's letter
    kind = unicodedata.category(character)
    return not (kind[0] == "Z" or kind in ("Cc", "Cf") or character in _INVISIBLE)


def head_weights(weights: Any) -> dict[str, float]:
    """Return the weights of heads, as given.

    Raises:
        UsageError: they are no mapping of heads to finite numbers.
    """
    if not isinstance(weights, Mapping):
        names = [weights] if isinstance(weights, str) else list(weights) if isinstance(weights, list | tuple) else []
        example = ", ".join(f"{name!r}: 1" for name in names) or "'dense': 1"
        raise UsageError(f"weights is {weights!r}; it maps each head to a number, such as {{{example}}}")
    for head, weight in weights.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise UsageError(f"weights: '{head}' is {weight!r}; a weight is a finite number")
    return dict(weights)


def _numpy(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def _cat(arrays: Sequence[Any]) -> Any:
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import torch

    return torch.cat(list(arrays))


def _cat_padded(arrays: Sequence[Any], value: float) -> Any:
    longest = max(array.shape[1] for array in arrays)
    return _cat([pad_tokens(array, longest, value) for array in arrays])


def pad_tokens(array: Any, length: int, value: float) -> Any:
    """Pad dimension 1 of an array, (batch, tokens, ...), at its end to `length` with `value`."""
    missing = length - array.shape[1]
    if missing <= 0:
        return array
    shape = (array.shape[0], missing, *array.shape[2:])
    if isinstance(array, np.ndarray):
        return np.concatenate([array, np.full(shape, value, array.dtype)], axis=1)
    import torch

    return torch.cat([array, array.new_full(shape, value)], dim=1)
