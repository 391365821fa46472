"""The engine of an encoder: its own batches to compare and to race with, and what it is chosen for; and its int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ultrarag.encoder.device import side_by_side
from ultrarag.encoder.engines import (
    INT8,
    Choice,
    Engine,
    Int8,
    Quantised,
    QueryTokenizer,
    Ready,
    Streams,
    asked_engine,
    is_kept,
    not_quantised,
    tokenizer_for,
)
from ultrarag.encoder.pairs import tokenize_pairs
from ultrarag.encoder.sides import Sides
from ultrarag.errors import UsageError

if TYPE_CHECKING:
    from ultrarag.encoder.forward import TokenEncoder
    from ultrarag.hookspecs import Features

_WORDS = ("which", "passages", "of", "the", "index", "answer", "42", "questions", "about", "a", "small", "encoder")
#: Words of the texts of each batch: several lengths, long ones alike, and one query.
_BATCHES = ((40, 3, 17), (90, 90, 90, 90), (8,))
#: Texts of which a tokenizer must make the same by itself; the third one is longer than models take.
_TEXTS = ("which passages?", "", "a long one " * 20000, " \n\t", "Čau 世界 👍🏽 ﬁ", "[SEP] </s> <s> [CLS]")


def engine_of(encoder: TokenEncoder, name: str | None, fingerprint: Callable[[], str]) -> Engine:
    """The engine asked for: see `Encoder.load`."""
    asked = asked_engine(name)
    if asked == "torch":
        return Engine()
    return Engine.chosen(asked, _choice(encoder, fingerprint))


def _choice(encoder: TokenEncoder, fingerprint: Callable[[], str]) -> Choice:
    return Choice(
        encode=encoder.adapter.encode,
        model=encoder.model,
        probes=[_probe(encoder, words) for words in _BATCHES],
        fingerprint=fingerprint,
        device=encoder.device.type,
        precision=encoder.precision,
    )


def int8_of(encoder: TokenEncoder, folder: Path, fingerprint: Callable[[], str]) -> Int8:
    """What is quantised beside the encoder's checkpoint, of the calibration that its precision names, if it names one.

    Raises:
        UsageError: nothing is, or of another model or calibration; the model cannot be; it is not on a CPU.
        CheckpointError: its files are damaged.
    """
    check_quantisable(encoder)
    record = Quantised.read(folder)
    if record is None:
        raise not_quantised(folder)
    if record.fingerprint != fingerprint():
        raise UsageError(
            f"'{folder}' was quantised when its model was another one ({record.fingerprint[:12]}, now "
            f"{fingerprint()[:12]}): quantise it again (ultrarag checkpoint quantise)"
        )
    if encoder.precision not in (INT8, record.precision):
        raise UsageError(
            f"'{folder}' is quantised with another calibration: {encoder.precision} is asked for, it has "
            f"{record.precision}"
        )
    return Int8.load(folder, record, _choice(encoder, fingerprint), _streams(encoder))


def keep_ready(encoder: TokenEncoder, fingerprint: Callable[[], str]) -> None:
    """Keep what a later process needs to encode queries as this encoder does, where its forward gives their vectors."""
    forward, tokenizer = encoder.compiled, encoder.reader("query").tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if forward is None or not forward.gives_dense or backend is None or is_kept(fingerprint(), encoder.precision):
        return
    record = Ready(
        settings=encoder.settings.to_dict(),
        limit=encoder.max_length("query"),
        fallback=tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        split_special_tokens=bool(tokenizer.split_special_tokens),
        inputs=forward.names,
        threads=torch.get_num_threads(),
        streams=_streams(encoder).at_once,
    )
    content = tokenizer_for(backend, record.limit, tokenizer.truncation_side)
    expected = encoder.tokenize(_TEXTS, "query")
    found = QueryTokenizer(content, record)([encoder.settings.render(text, "query") for text in _TEXTS])
    if found == (expected.ids, expected.truncated):
        record.keep(fingerprint(), encoder.precision, content)


def check_quantisable(encoder: TokenEncoder) -> None:
    """Raise UsageError where an encoder cannot run in int8, whatever lies beside it; says why."""
    reason = ""
    if encoder.device.type != "cpu":
        reason = f"int8 runs on a CPU, and the encoder is on {encoder.device.type}: say device='cpu'"
    elif encoder.adapter.declared.pair_input:
        reason = "a reranker is not quantised: its scores in int8 have no gate yet; use bf16"
    elif isinstance(encoder.model, Sides):
        reason = "a model of two sides is not quantised: quantise a model of one side"
    if reason:
        raise UsageError(f"{encoder.adapter.describe()} cannot run in int8: {reason}")


def _streams(encoder: TokenEncoder) -> Streams:
    """As many forwards at a time as there are threads, each in one: small products gain nothing from two."""
    many = side_by_side() if encoder.adapter.registry.threaded_encode(encoder.adapter.name) else 1
    return Streams(many, torch.get_num_threads())


def probe(encoder: TokenEncoder) -> Features:
    """A batch of rows of different lengths, to trace a backbone with."""
    return _probe(encoder, _BATCHES[0])


def _probe(encoder: TokenEncoder, words: tuple[int, ...]) -> Features:
    texts = [" ".join(_WORDS[place % len(_WORDS)] for place in range(count)) for count in words]
    if encoder.adapter.declared.pair_input:
        tokens = tokenize_pairs(encoder, [("which engine", text) for text in texts])
    else:
        tokens = encoder.tokenize(texts, "passage")
    return {**encoder.features(tokens), "heads": encoder.heads}
