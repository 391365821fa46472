"""The engine of an encoder: its own batches to compare and to race with, and what it is chosen for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ultrarag.encoder.engines import Choice, Engine, asked_engine
from ultrarag.encoder.pairs import tokenize_pairs

if TYPE_CHECKING:
    from ultrarag.encoder.forward import TokenEncoder
    from ultrarag.hookspecs import Features

_WORDS = ("which", "passages", "of", "the", "index", "answer", "42", "questions", "about", "a", "small", "encoder")
#: Words of the texts of each batch: several lengths, long ones alike, and one query.
_BATCHES = ((40, 3, 17), (90, 90, 90, 90), (8,))


def engine_of(encoder: TokenEncoder, name: str | None, fingerprint: Callable[[], str]) -> Engine:
    """The engine asked for: see `Encoder.load`."""
    asked = asked_engine(name)
    if asked == "torch":
        return Engine()
    return Engine.chosen(
        asked,
        Choice(
            encode=encoder.adapter.encode,
            model=encoder.model,
            probes=[_probe(encoder, words) for words in _BATCHES],
            fingerprint=fingerprint,
            device=encoder.device.type,
            precision=encoder.precision,
        ),
    )


def _probe(encoder: TokenEncoder, words: tuple[int, ...]) -> Features:
    texts = [" ".join(_WORDS[place % len(_WORDS)] for place in range(count)) for count in words]
    if encoder.adapter.declared.pair_input:
        tokens = tokenize_pairs(encoder, [("which engine", text) for text in texts])
    else:
        tokens = encoder.tokenize(texts, "passage")
    return {**encoder.features(tokens), "heads": encoder.heads}
