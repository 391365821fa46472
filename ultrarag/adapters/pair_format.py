"""PairFormat: how a tokenizer joins query and passage: its special tokens and segments, read off one joined pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import CheckpointError
from ultrarag.types import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = ("a", "b")


@dataclass(frozen=True)
class _Fixed:
    """Special tokens at one place of a pair."""

    ids: list[int]
    types: list[int]


@dataclass(frozen=True)
class PairFormat:
    """The special tokens around query and passage, and the segments of both."""

    before: _Fixed
    between: _Fixed
    after: _Fixed
    #: segment of the query's and the passage's tokens
    segments: tuple[int, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path: str) -> PairFormat:
        """Read the format off a pair that the tokenizer joins.

        Raises:
            CheckpointError: the tokenizer is a slow one, or does not join pairs.
        """
        pair = fast_backend(tokenizer, path).encode(*_PROBE)
        owners = pair.sequence_ids
        if 0 not in owners or 1 not in owners:
            raise CheckpointError(f"{path}: the tokenizer does not join a query and a passage, which a reranker reads")
        query, passage = owners.index(0), owners.index(1)
        query_end, passage_end = (len(owners) - owners[::-1].index(owner) for owner in (0, 1))
        places = [slice(0, query), slice(query_end, passage), slice(passage_end, None)]
        before, between, after = (_Fixed(pair.ids[place], pair.type_ids[place]) for place in places)
        return cls(before, between, after, (pair.type_ids[query], pair.type_ids[passage]))

    @property
    def special(self) -> int:
        """How many special tokens a pair has."""
        return len(self.before.ids) + len(self.between.ids) + len(self.after.ids)

    def join(self, query: Sequence[int], passage: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the pair's token ids and their segments."""
        ids = [*self.before.ids, *query, *self.between.ids, *passage, *self.after.ids]
        first, second = self.segments
        types = [*self.before.types, *[first] * len(query), *self.between.types, *[second] * len(passage)]
        return ids, [*types, *self.after.types]


def fast_backend(tokenizer: Any, path: str) -> Any:
    """The tokenizer's Rust part, set to neither cut nor pad.

    Raises:
        CheckpointError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{path}: a reranker needs a fast tokenizer (tokenizer.json); leave --use_fast_tokenizer")
    if not hasattr(tokenizer, "declared_limits"):
        tokenizer.declared_limits = _limits(backend)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _limits(backend: Any) -> dict[str, Any]:
    """The truncation and padding that tokenizer.json declares, as it writes them; empty where it has neither."""
    if backend.truncation is None and backend.padding is None:
        return {}
    from tokenizers import Tokenizer, models

    blank = Tokenizer(models.WordLevel({}, unk_token=""))
    if backend.truncation is not None:
        blank.enable_truncation(**backend.truncation)
    if backend.padding is not None:
        blank.enable_padding(**backend.padding)
    values = json.loads(blank.to_str())
    return {name: values[name] for name in ("truncation", "padding")}


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer of a reranker with the limits that `fast_backend` took from it, which other tools go by."""
    tokenizer.save_pretrained(folder)
    if tokenizer.declared_limits:
        file = folder / "tokenizer.json"
        values = {**json.loads(file.read_text(encoding="utf-8")), **tokenizer.declared_limits}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def token_ids(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text without special tokens; a text that comes several times is tokenized once.

    The backend is called directly: it keeps no state then, so that threads may share it.
    """
    distinct = list(dict.fromkeys(texts))
    known = {
        text: encoding.ids
        for text, encoding in zip(distinct, backend.encode_batch(distinct, add_special_tokens=False), strict=True)
    }
    return [known[text] for text in texts]


def join_pairs(
    backend: Any,
    template: PairFormat,
    queries: Sequence[str],
    passages: Sequence[str],
    query_max_length: int | None,
    max_length: int | None,
    passage_max_length: int | None = None,
) -> Tokens:
    """Tokenize both sides and join them; of a pair that is too long the passage is cut.

    Args:
        query_max_length: tokens of a query, special ones not counted.
        max_length: tokens of a pair, all counted.
        passage_max_length: tokens of a passage, special ones not counted.
    """
    tokens = Tokens([], types=[])
    assert tokens.types is not None
    for query, passage in zip(token_ids(backend, queries), token_ids(backend, passages), strict=True):
        room = None if max_length is None else max_length - template.special
        left = query[: shortest(query_max_length, room)]
        right = passage[: shortest(passage_max_length, None if room is None else room - len(left))]
        ids, types = template.join(left, right)
        tokens.ids.append(ids)
        tokens.types.append(types)
        tokens.truncated += len(left) < len(query) or len(right) < len(passage)
    return tokens


def shortest(*limits: int | None) -> int | None:
    """The smallest of the limits that are set, at least 0."""
    known = [max(0, limit) for limit in limits if limit is not None]
    return min(known) if known else None
