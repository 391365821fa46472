"""Pairs: what a cross-encoder reads in place of texts, tokenized by its model and scored in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ultrarag.encoder.forward import TokenEncoder
from ultrarag.encoder.tokens import check_texts, tokenized_chunks
from ultrarag.errors import PluginError, UsageError
from ultrarag.io import progress_bar
from ultrarag.types import Embeddings, Tokens, head_weights

#: Pairs tokenized and sorted by length together.
CHUNK_PAIRS = 4096


def tokenize_pairs(
    encoder: TokenEncoder,
    pairs: Sequence[tuple[str, str]],
    query_max_length: int | None = None,
    max_length: int | None = None,
    instruction: str | None = None,
) -> Tokens:
    """Return the pairs as the model reads them: see `Encoder.tokenize_pairs`."""
    queries, passages = _sides(pairs)
    limit = encoder.max_length("passage", max_length)
    return render_pairs(
        encoder,
        queries,
        passages,
        [instruction] * len(queries),
        query_limit(query_max_length, limit, encoder.settings.query_max_length),
        limit,
    )


def render_pairs(
    encoder: TokenEncoder,
    queries: Sequence[str],
    passages: Sequence[str],
    instructions: Sequence[str | None],
    query_max_length: int | None,
    max_length: int | None,
    **more: Any,
) -> Tokens:
    """Put the instructions of both sides in, and return the tokens of the pairs, in serving and in training.

    Args:
        instructions: of each pair, None: the model's own. It takes the place of a language model's `prompt`, and of the
            query's instruction in other models.
        more: `passage_max_length`, given only where a run sets it.
    """
    settings = encoder.settings
    asks = settings.prompt is not None
    if asks and any(instruction is not None for instruction in instructions):
        more["prompts"] = list(instructions)
    before = [None] * len(queries) if asks else instructions
    return _read_pairs(
        encoder,
        [settings.render(text, "query", instruction) for text, instruction in zip(queries, before, strict=True)],
        [settings.render(text, "passage") for text in passages],
        query_max_length,
        max_length,
        **more,
    )


def _read_pairs(
    encoder: TokenEncoder,
    queries: Sequence[str],
    passages: Sequence[str],
    query_max_length: int | None,
    max_length: int | None,
    **more: Any,
) -> Tokens:
    """Ask the model for the tokens of rendered pairs.

    Args:
        more: `passage_max_length`, `prompts`: given only where a run sets them.

    Raises:
        PluginError: its adapter says that it reads pairs, and its model does not say how.
    """
    read = getattr(encoder.model, "pair_tokens", None)
    if read is None:
        raise PluginError(
            f"{encoder.adapter.describe()} declares pair_input, but the model that its hook 'load' returned has no "
            "method pair_tokens(queries, passages, query_max_length, max_length) -> ultrarag.types.Tokens"
        )
    tokens: Tokens = read(queries, passages, query_max_length, max_length, **more)
    return tokens


def query_limit(asked: int | None, max_length: int | None, declared: int | None = None) -> int | None:
    """The most tokens of a query: as asked, else three quarters of the pair's, so that a passage has its share.

    Raises:
        UsageError: the query may be as long as the whole pair.
    """
    if max_length is None:
        return declared if asked is None else asked
    if asked is None:
        share = max(1, max_length * 3 // 4)
        return share if declared is None else min(declared, share)
    if asked >= max_length:
        raise UsageError(f"a query of {asked} tokens of a pair's {max_length} leaves nothing for the passage")
    return asked


def score_pairs(
    encoder: TokenEncoder,
    pairs: Sequence[tuple[str, str]],
    weights: dict[str, float] | None = None,
    normalize: bool = False,
    *,
    batch_tokens: int | None = None,
    precision: str | None = None,
    query_max_length: int | None = None,
    max_length: int | None = None,
    instruction: str | None = None,
    progress: bool | None = None,
    chunk_pairs: int = CHUNK_PAIRS,
) -> np.ndarray:
    """Return the scores of (query, passage) pairs, (n,) float32: see `Encoder.score`.

    Raises:
        UsageError: weights, which one score does not have, or a pair that is none.
    """
    if weights is not None and set(head_weights(weights)) != {"scores"}:
        raise UsageError("a cross-encoder gives one score per pair: leave `weights` out")
    read = partial(
        tokenize_pairs, encoder, query_max_length=query_max_length, max_length=max_length, instruction=instruction
    )
    length = encoder.max_length("passage", max_length)
    chunks = tokenized_chunks(pairs, read, chunk_pairs)
    parts = [np.zeros(0, dtype=np.float32)]
    with progress_bar(len(pairs), "score", "pair", progress) as bar:
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "precision": precision, "on_batch": bar.update}
        for part in encoder.encode_chunks(chunks, "pairs", length, **options):
            parts.append(np.asarray(part.scores, dtype=np.float32))
    scores = np.concatenate(parts)
    return _logistic(scores) if normalize else scores


def _logistic(scores: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), written so that neither sign overflows."""
    return (0.5 * (1 + np.tanh(0.5 * scores.astype(np.float64)))).astype(np.float32)


def _sides(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    if isinstance(pairs, str):
        raise UsageError(f"pairs is the text {pairs!r:.80}; give a list of (query, passage) pairs")
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise UsageError(
                f"pairs[{number}] is no (query, passage) pair: {pair!r:.80}; give a list such as [(query, passage)]"
            )
    queries, passages = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    check_texts(queries)
    check_texts(passages)
    return queries, passages


def score_texts(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[..., Embeddings],
    similarity: Callable[[Embeddings, Embeddings], np.ndarray],
) -> np.ndarray:
    """Score pairs by a model that encodes texts one by one: each distinct text once, (n,) float32.

    Args:
        encode: texts and their kind -> their vectors.
        similarity: vectors of queries and of passages -> scores, (queries, passages).
    """
    queries, passages = _sides(pairs)
    left = {text: row for row, text in enumerate(dict.fromkeys(queries))}
    right = {text: row for row, text in enumerate(dict.fromkeys(passages))}
    query, passage = encode(list(left), "query"), encode(list(right), "passage")
    by_query: dict[int, list[int]] = {}
    for number, (text, _) in enumerate(pairs):
        by_query.setdefault(left[text], []).append(number)
    scores = np.empty(len(pairs), dtype=np.float32)
    for row, numbers in by_query.items():
        columns = np.array([right[pairs[number][1]] for number in numbers])
        scores[numbers] = similarity(query[row : row + 1], passage[columns])[0]
    return scores
