"""Checks on what `encode` gives: shapes, and that a text's vector depends on nothing but the text."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ultrarag.testing.subject import Failed, Subject, difference
from ultrarag.testing.tiny import TEXTS
from ultrarag.types import Embeddings, Sparse

#: Largest difference of a component between two ways of encoding one text.
TOLERANCE = 1e-5
#: Largest difference between two runs of the same batch; 0 on a CPU.
SAME = 1e-6
#: Tokens of the over-long text where the model declares no limit.
LONG = 2048


def check_load(subject: Subject) -> str:
    """The model is what ultrarag relies on: float32, with a tokenizer that pads."""
    encoder = subject.encoder
    odd = [name for name, p in encoder.model.named_parameters() if p.is_floating_point() and p.dtype != torch.float32]
    if odd:
        raise Failed(f"the weight '{odd[0]}' is not float32", "load in float32; precision is chosen by the caller")
    if encoder.tokenizer.pad_token_id is None:
        raise Failed("the tokenizer has no padding token", "give it one in 'load', such as its eos token")
    unknown = [head for head in encoder.heads if head not in encoder.adapter.declared.heads]
    if unknown:
        raise Failed(
            f"the model says it has the head '{unknown[0]}', which the adapter does not declare",
            "name every head that a model can have in the adapter's `heads`",
        )
    count = sum(p.numel() for p in encoder.model.parameters())
    return f"{type(encoder.model).__name__}, {count:,} parameters, heads {', '.join(encoder.heads)}"


def check_shapes(subject: Subject) -> str:
    """Every head has the shape and dtype that `Embeddings` documents, and only the heads asked for are there."""
    encoder = subject.encoder
    features = subject.features(encoder, subject.rows)
    everything = subject.embed(encoder, features)
    if everything.heads != encoder.heads:
        raise Failed(
            f"'encode' gave the heads {everything.heads} of a model with {encoder.heads}",
            "compute all heads of the model where features has no 'heads', and set model.settings.heads in 'load'",
        )
    for head in encoder.heads:
        alone = subject.embed(encoder, features, (head,))
        if alone.heads != (head,):
            raise Failed(f"asked for '{head}' alone, 'encode' gave {alone.heads}", "obey features['heads']")
        _check_head(alone, head, len(subject.rows))
        if encoder.settings.normalize and head == "dense":
            _check_unit_length(alone.dense)
    return ", ".join(f"{head} {_shape(everything, head)}" for head in encoder.heads)


def _check_head(embeddings: Embeddings, head: str, rows: int) -> None:
    for array in embeddings.arrays():
        if not isinstance(array, Tensor) or array.shape[0] != rows:
            raise Failed(f"head '{head}' holds {_describe(array)} for {rows} texts", "return one row per text")
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise Failed(f"head '{head}' holds values that are not finite", "look for a division by zero, or a log")
    if head == "sparse":
        assert embeddings.sparse is not None
        _check_sparse(embeddings.sparse)
    elif head == "colbert":
        _check_colbert(embeddings.colbert, embeddings.mask)
    else:
        array = getattr(embeddings, head)
        wanted = 1 if head == "scores" else 2
        if array.ndim != wanted or not array.is_floating_point():
            raise Failed(
                f"head '{head}' is {_describe(array)}",
                f"return floats of {'(batch,)' if wanted == 1 else '(batch, dim)'}",
            )


def _check_sparse(sparse: Sparse) -> None:
    ids, weights = sparse.ids, sparse.weights
    remedy = "return ids and weights of (batch, tokens): distinct ids ascending, then Sparse.PAD_ID with weight 0"
    if ids.shape != weights.shape or ids.ndim != 2 or ids.dtype != torch.int64 or not weights.is_floating_point():
        raise Failed(f"head 'sparse' has ids {_describe(ids)} and weights {_describe(weights)}", remedy)
    real = ids >= 0
    both = real[:, 1:]
    if bool((both & ~real[:, :-1]).any()) or bool(((ids[:, 1:] <= ids[:, :-1]) & both).any()):
        raise Failed("head 'sparse' has ids that are not ascending, repeat, or follow padding", remedy)
    if bool((weights[~real] != 0).any()):
        raise Failed("head 'sparse' gives padding a weight", remedy)
    if bool((weights < 0).any()):
        raise Failed("head 'sparse' has negative weights, which no index stores", "apply ReLU or softplus")


def _check_colbert(vectors: Tensor, mask: Tensor | None) -> None:
    if mask is None or vectors.ndim != 3 or mask.shape != vectors.shape[:2]:
        found = f"{_describe(vectors)} with the mask {_describe(mask)}"
        raise Failed(f"head 'colbert' is {found}", "return (batch, tokens, dim) and a mask of (batch, tokens)")
    if bool((vectors[~mask.bool()] != 0).any()):
        raise Failed("head 'colbert' is not zero at padding", "multiply by the mask before normalising")


def _check_unit_length(dense: Tensor) -> None:
    off = float((dense.norm(dim=-1) - 1).abs().max())
    if off > 1e-3:
        raise Failed(
            f"settings.normalize is true, and a dense vector's length is off by {off:.3g}",
            "normalise in 'encode', or set model.settings.normalize to False",
        )


def check_determinism(subject: Subject) -> str:
    """The same batch gives the same vectors twice."""
    features = subject.features(subject.encoder, subject.rows)
    first, second = (subject.embed(subject.encoder, features) for _ in range(2))
    return _agree(
        difference(first, second),
        "the same batch encoded twice differs",
        "leave dropout and sampling to training mode (self.training)",
        SAME,
    )


def check_batch_invariance(subject: Subject) -> str:
    """A text's vector is the same alone, among others, and in another order."""
    encoder, rows = subject.encoder, subject.rows
    together = subject.embed(encoder, subject.features(encoder, rows))
    reversed_ = subject.embed(encoder, subject.features(encoder, rows[::-1]))
    order = np.arange(len(rows))[::-1].copy()
    found = [difference(together, reversed_[order])]
    for number, row in enumerate(rows):
        alone = subject.embed(encoder, subject.features(encoder, [row]))
        found.append(difference(together[number : number + 1], alone))
    return _agree(
        max(found),
        "a text alone and among others differs",
        "use features['attention_mask'] in attention and pooling, and let no row see another",
    )


def check_padding(subject: Subject) -> str:
    """Padding at the tokenizer's side changes nothing, however much of it there is."""
    encoder, rows = subject.encoder, subject.rows
    own = encoder.tokenizer.padding_side
    other = "left" if own == "right" else "right"
    plain = subject.embed(encoder, subject.features(encoder, rows))
    plain_width = subject.features(encoder, rows)["input_ids"].shape[1]
    width = plain_width + 3 if encoder.limit is None else min(plain_width + 3, encoder.limit)
    _agree(
        difference(plain, subject.embed(encoder, subject.features(encoder, rows, own, width))),
        f"{width - plain_width} more columns of padding on the {own} change a vector",
        "find the first and last token by features['attention_mask'], and count positions from the first",
    )
    off, _ = difference(plain, subject.embed(encoder, subject.features(encoder, rows, other, width)))
    if off <= TOLERANCE:
        return "left and right, as much as you like"
    return f"holds on the {own}, the tokenizer's side; on the {other} vectors differ by {off:.2g}: keep padding_side"


def check_odd_texts(subject: Subject) -> str:
    """Empty texts have finite vectors, and over-long ones are cut to the model's length."""
    encoder = subject.encoder
    limit = encoder.max_length("passage")
    words = " ".join([*TEXTS] * (1 + (limit or LONG) // 40))
    empty, long = (("", ""), (TEXTS[0], words)) if subject.pairs else ("", words)
    for text, what in ((empty, "the empty text"), (long, "an over-long text")):
        tokens = subject.tokens(encoder, [text])
        if limit is not None and len(tokens.ids[0]) > limit:
            raise Failed(f"{what} became {len(tokens.ids[0])} tokens of at most {limit}", "cut texts to the limit")
        try:
            found = subject.embed(encoder, subject.features(encoder, [text]))
        except (IndexError, RuntimeError) as error:
            raise Failed(
                f"{what} ({len(tokens.ids[0])} tokens) stops 'encode': {type(error).__name__}: {error}",
                "declare the limit as config.max_position_embeddings, tokenizer.model_max_length or "
                "settings.passage_max_length",
            ) from error
        if not all(bool(torch.isfinite(array).all()) for array in found.arrays()):
            raise Failed(f"{what} gives values that are not finite", "guard the division by the number of tokens")
    return f"empty, and {len(tokens.ids[0])} tokens ({f'cut at {limit}' if limit else 'no limit declared'})"


def _agree(found: tuple[float, str], what: str, remedy: str, tolerance: float = TOLERANCE) -> str:
    """Raise Failed when a difference is above the tolerance, else say how large it is."""
    value, head = found
    if not value <= tolerance:
        raise Failed(f"{what} by {value:.3g} in head '{head}' (at most {tolerance:g})", remedy)
    return f"largest difference {value:.2g}"


def _describe(array: object) -> str:
    if not isinstance(array, Tensor):
        return type(array).__name__
    return f"{str(array.dtype).removeprefix('torch.')} of {tuple(array.shape)}"


def _shape(embeddings: Embeddings, head: str) -> tuple[int, ...]:
    array = embeddings.sparse.ids if embeddings.sparse and head == "sparse" else getattr(embeddings, head)
    return tuple(array.shape)
