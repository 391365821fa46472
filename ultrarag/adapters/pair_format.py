"""How a model reads a pair: joined by its tokenizer (PairFormat), or written into a text of its own (PairTemplate)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import CheckpointError, UsageError
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


#: What is written into a PairTemplate.
SLOTS = ("instruction", "query", "passage")
#: Texts for finding out what tokens end every pair: they share no token.
_FILLERS = ("0", "1 2 3 4")


@dataclass(frozen=True)
class Frame:
    """A text with places for query, passage and perhaps an instruction."""

    #: one more than `slots`: what stands before, between and after them
    literals: tuple[str, ...]
    #: names of SLOTS, in the order in which they are read
    slots: tuple[str, ...]
    #: slots whose texts are written without the spaces around them
    stripped: frozenset[str] = frozenset()

    def fill(self, texts: Mapping[str, str]) -> tuple[str, int, int]:
        """Return the whole text, and where the passage begins and ends in it, in characters."""
        written, start, end = self.literals[0], 0, 0
        for slot, literal in zip(self.slots, self.literals[1:], strict=True):
            text = texts[slot].strip() if slot in self.stripped else texts[slot]
            if slot == "passage":
                start, end = len(written), len(written) + len(text)
            written += text + literal
        return written, start, end

    def text(self, instruction: str, query: str, passage: str) -> str:
        """The whole text alone."""
        return self.fill({"instruction": instruction, "query": query, "passage": passage})[0]


@dataclass
class PairTemplate:
    """Writes a pair into one text, as a language model was trained to read it, and tokenizes that text as a whole.

    Whole, since tokens reach over the seams: the space before a query and its first word are one.
    """

    #: of a pair without an instruction
    plain: Frame
    #: of a pair with one; None: the model has no place for it
    asked: Frame | None
    #: what declares it, for errors
    source: str
    #: the instruction -> (tokens of the frame alone, tokens that end every pair)
    _ends: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def tokens(
        self,
        backend: Any,
        pairs: Sequence[tuple[str, str, str]],
        query_max_length: int | None = None,
        max_length: int | None = None,
        passage_max_length: int | None = None,
    ) -> Tokens:
        """Tokenize (instruction, query, passage); of a pair that is too long the passage is cut, never what ends it.

        Raises:
            UsageError: an instruction that the model has no place for, or a `max_length` without room for a pair.
        """
        queries = self._queries(backend, pairs, query_max_length, max_length)
        filled = []
        for (instruction, _, passage), (query, _) in zip(pairs, queries, strict=True):
            texts = {"instruction": instruction, "query": query, "passage": passage}
            filled.append(self.frame(instruction).fill(texts))
        tokens = Tokens([])
        encodings = backend.encode_batch_fast([text for text, _, _ in filled], add_special_tokens=False)
        longest = shortest(max_length, passage_max_length)
        for encoding, place, pair, (_, cut) in zip(encodings, filled, pairs, queries, strict=True):
            ids = encoding.ids
            if longest is not None and len(ids) > longest:
                ids = self._cut(backend, pair[0], place, max_length, passage_max_length)
            tokens.ids.append(ids)
            tokens.truncated += cut or len(ids) < len(encoding.ids)
        return tokens

    def frame(self, instruction: str) -> Frame:
        """The frame of pairs with this instruction, "" for none."""
        if not instruction:
            return self.plain
        if self.asked is None:
            raise UsageError(
                f"{self.source} has no place for an instruction, and one was given ({instruction!r:.80}): leave it out"
            )
        return self.asked

    def _queries(
        self, backend: Any, pairs: Sequence[tuple[str, str, str]], query_max_length: int | None, max_length: int | None
    ) -> list[tuple[str, bool]]:
        """Each query as far as its tokens fit, and whether it was cut."""
        if query_max_length is None and max_length is None:
            return [(query, False) for _, query, _ in pairs]
        distinct = list(dict.fromkeys(query for _, query, _ in pairs))
        known = dict(zip(distinct, backend.encode_batch(distinct, add_special_tokens=False), strict=True))
        found = []
        for instruction, query, _ in pairs:
            allowed = shortest(query_max_length, self._room(backend, instruction, max_length))
            offsets = known[query].offsets
            cut = allowed is not None and len(offsets) > allowed
            found.append((query[: offsets[allowed - 1][1] if allowed else 0] if cut else query, cut))
        return found

    def _room(self, backend: Any, instruction: str, max_length: int | None) -> int | None:
        """How many tokens query and passage may have together."""
        if max_length is None:
            return None
        fixed, _ = self._around(backend, instruction)
        if max_length <= fixed:
            raise UsageError(
                f"max_length is {max_length}, and what {self.source} puts around a pair takes {fixed} tokens: nothing "
                "is left for query and passage; raise it, or set a shorter `prompt`"
            )
        return max_length - fixed

    def _around(self, backend: Any, instruction: str) -> tuple[int, list[int]]:
        """The number of tokens around an empty pair, and those with which every pair ends."""
        if instruction not in self._ends:
            frame = self.frame(instruction)
            texts = [frame.text(instruction, filler, filler) for filler in ("", *_FILLERS)]
            empty, one, other = (row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False))
            count = next((n for n, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
            self._ends[instruction] = len(empty), one[len(one) - count :]
        return self._ends[instruction]

    def _cut(
        self,
        backend: Any,
        instruction: str,
        place: tuple[str, int, int],
        max_length: int | None,
        passage_max_length: int | None,
    ) -> list[int]:
        """The tokens of one text, the passage's last ones left out; what follows it stands whole."""
        text, start, end = place
        encoding = backend.encode(text, add_special_tokens=False)
        starts = [first for first, _ in encoding.offsets]
        before = sum(first < start for first in starts)
        passage = sum(start <= first < end for first in starts)
        _, ending = self._around(backend, instruction)
        if self.frame(instruction).slots[-1] != "passage":
            ending = encoding.ids[before + passage :]
        whole = max_length is None or len(encoding.ids) <= max_length
        if whole and (passage_max_length is None or passage <= passage_max_length):
            return list(encoding.ids)
        kept = passage if passage_max_length is None else min(passage, passage_max_length)
        room = None if max_length is None else max(0, max_length - len(ending))
        return [*encoding.ids[: before + kept][:room], *ending]
