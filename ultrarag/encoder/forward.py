"""TokenEncoder: a model with its adapter on a device, from tokenized texts to Embeddings, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ultrarag.checkpoint import Manifest
from ultrarag.encoder.cuts import Cuts
from ultrarag.encoder.device import Casts, keep_freed_memory, map_side_by_side, one_ahead, side_by_side
from ultrarag.encoder.engines import Dense, Engine, Forward, Int8, Quantised
from ultrarag.encoder.load import checked_device, checked_precision, dtype_of
from ultrarag.encoder.pooling import pooled
from ultrarag.encoder.sides import Sides
from ultrarag.encoder.tokens import (
    batches_by_tokens,
    check_texts,
    effective_length,
    pad,
    render,
    token_limit,
    tokenize,
)
from ultrarag.errors import UsageError, did_you_mean
from ultrarag.hookspecs import Features
from ultrarag.plugins import Adapter
from ultrarag.products import multiply_by_onednn
from ultrarag.scores import greatest
from ultrarag.transfer import remember_host, to_device, to_host
from ultrarag.types import Embeddings, EncoderSettings, Kind, Passage, Tokens

#: Padded tokens per forward: small enough for a CPU's caches, large enough for a GPU to be busy.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


#: Of a compiled model's batch of queries, which has its padding computed. Of 10 queries of 35 to 57 tokens padding is a
#: fifth, and a forward of 4 takes 3 % more a query than one of 10 (MiniLM, Zen 5).
FILL = 0.85


def _in_training(model: nn.Module) -> bool:
    """Whether any part of it is; `modules()` takes 1.2 ms for MiniLM, as long as a short query in int8."""
    left = [model]
    while left:
        module = left.pop()
        if module.training:
            return True
        left.extend(child for child in module._modules.values() if child is not None)
    return False


class TokenEncoder:
    """The part of an `Encoder` that knows tokens: its limits, its batches, its forward."""

    def __init__(
        self,
        adapter: Adapter,
        model: nn.Module,
        settings: EncoderSettings,
        manifest: Manifest | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.manifest = manifest
        self.device = checked_device(device)
        self.precision = checked_precision(precision, self.device)
        self.model = model.to(self.device).eval()
        if self.device.type == "cpu":
            keep_freed_memory()
            multiply_by_onednn(self.model)
        model.settings = settings  # type: ignore[assignment]
        #: Python code that comes with the model may be run, also when it is loaded again
        self.trust_remote_code = False
        #: the model's matrices in lower precision, until it is trained
        self.casts = Casts()
        #: what runs its forward in float32
        self._engine = Engine()
        #: what runs it in int8, where it was loaded so
        self._int8: Int8 | None = None
        #: the settings when it was compiled, of which a compiled head has some in it
        self._compiled_for = replace(settings)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the model has."""
        return self.settings.heads

    @property
    def engine(self) -> str:
        """What runs the model: torch, or the runtime that its backbone is compiled for."""
        return "openvino" if self._int8 else self._engine.name

    @property
    def compiled(self) -> Forward | None:
        """What runs the backbone of the model, where it is compiled."""
        return self._int8.forward if self._int8 else self._engine.forward

    @property
    def quantised(self) -> Quantised | None:
        """What its int8 was calibrated on and measured by; None where it was not loaded in int8."""
        return self._int8.record if self._int8 else None

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.model.tokenizer

    @property
    def limit(self) -> int | None:
        """The most tokens that the model can take."""
        return token_limit(self.tokenizer, self.model.config)

    def reader(self, kind: Kind | None) -> Any:
        """What reads texts of this kind: `model`, one of its sides, or what that has for the kind."""
        found: Any = self.model.side(kind) if isinstance(self.model, Sides) and kind else self.model
        of_kind = getattr(found, "text_reader", None)
        return of_kind(kind) if of_kind and kind else found

    def max_length(self, kind: Kind, asked: int | None = None) -> int | None:
        """The token limit for texts of `kind`; raises UsageError when `asked` is more than the model takes."""
        reader = self.reader(kind)
        return effective_length(asked, self.settings.max_length(kind), token_limit(reader.tokenizer, reader.config))

    def tokenize(
        self, texts: Sequence[str | Passage], kind: Kind, max_length: int | None = None, instruction: str | None = None
    ) -> Tokens:
        """Render the texts with their kind's instruction and tokenize them.

        Raises:
            UsageError, DataError: a text is no string, or holds what is not text.
        """
        check_texts(texts)
        rendered = render(self.settings, texts, kind, instruction)
        return tokenize(self.reader(kind).tokenizer, rendered, self.max_length(kind, max_length), kind)

    def features(self, tokens: Tokens, rows: Sequence[int] | None = None, multiple_of: int | None = None) -> Features:
        """Pad some rows of tokenized texts or pairs into one batch on the CPU."""
        chosen = tokens.ids if rows is None else [tokens.ids[row] for row in rows]
        types = tokens.types if tokens.types is None or rows is None else [tokens.types[row] for row in rows]
        tokenizer = self.reader(tokens.kind).tokenizer
        return pad(chosen, tokenizer.pad_token_id, tokenizer.padding_side, multiple_of, types, tokens.kind)

    def encode_chunks(
        self,
        chunks: Iterator[Tokens],
        what: str,
        length: int | None,
        heads: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        precision: str | None = None,
        on_batch: Callable[[int], object] | None = None,
        cuts: Cuts | None = None,
    ) -> Iterator[Embeddings]:
        """Yield the embeddings of each chunk of tokenized texts or pairs; say in the end how many were cut."""
        chosen = self.checked_heads(heads)
        budget = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        dtype = dtype_of(precision or self.precision, self.device)
        counted = cuts or Cuts()
        for tokens in chunks:
            counted.add(tokens.truncated, len(tokens), what, length)
            yield self.encode_tokens(tokens, chosen, budget, dtype, on_batch)
        if cuts is None:
            counted.tell()

    def encode_tokens(
        self,
        tokens: Tokens,
        heads: tuple[str, ...],
        budget: int = BATCH_TOKENS["cpu"],
        dtype: torch.dtype | None = None,
        on_batch: Callable[[int], object] | None = None,
    ) -> Embeddings:
        """Return the embeddings of tokenized texts, in their order.

        Args:
            budget: padded tokens per forward, at most.
            dtype: of the forward, if not float32; int8 for what is quantised.
            on_batch: told the number of texts after each forward.
        """
        if (dense := self._dense(tokens.kind, heads, dtype)) and len(tokens) == 1:
            found = Embeddings(dense=dense(tokens.ids))
            if on_batch:
                on_batch(1)
            return found
        if _in_training(self.model):
            self.model.eval()
        workers = self._workers(dtype)
        fill = FILL if dense else 0.0
        batches = list(batches_by_tokens([len(row) for row in tokens.ids], budget, workers, fill))

        @torch.no_grad()  # not inference_mode: a buffer first made here may be needed by a later training step
        def start(rows: list[int]) -> Callable[[], Embeddings]:
            if dense:
                return Embeddings(dense=dense([tokens.ids[row] for row in rows])).numpy
            return to_host(self._forward(self.features(tokens, rows), heads, dtype))

        if self.device.type == "cpu":
            results = map_side_by_side(lambda rows: start(rows)(), batches, workers)
        else:
            results = one_ahead(start, batches)
        parts, order = [], []
        for rows, part in results:
            parts.append(self._pooled(part, tokens.kind))
            order.extend(rows)
            if on_batch:
                on_batch(len(rows))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return Embeddings.cat(parts)[place]

    def gives_dense(self, kind: Kind | None, heads: tuple[str, ...], dtype: torch.dtype | None) -> bool:
        """Whether such texts are encoded in one piece, by a compiled model, while nothing about it changes."""
        forward = self._int8.forward if self._int8 and dtype is torch.int8 else self._engine.forward
        fits = kind == "query" and heads == ("dense",) and dtype in (None, torch.int8)
        return fits and forward is not None and forward.gives_dense

    def _dense(self, kind: Kind | None, heads: tuple[str, ...], dtype: torch.dtype | None) -> Dense | None:
        """What gives queries' dense vectors in one piece, where those alone are asked for and no extension is around.

        Passages have the adapter's own head: the compiled one is for queries, which an adapter may read otherwise.
        """
        if not self.gives_dense(kind, heads, dtype):
            return None
        if self.settings != self._compiled_for or self.adapter.registry.wrapping("encode"):
            return None
        if dtype is None:
            return self._engine.dense(self.model)
        return self._int8.dense(self.model) if self._int8 else None

    def _workers(self, dtype: torch.dtype | None) -> int:
        """Forwards to run at a time: one on a GPU, and where a plugin does not say that several may run."""
        if self._engine.name != "torch" and dtype is None:
            return 1  # it divides a forward among its threads itself
        if self.device.type != "cpu" or not self.adapter.registry.threaded_encode(self.adapter.name):
            return 1
        return side_by_side()

    def _forward(self, features: Features, heads: tuple[str, ...], dtype: torch.dtype | None) -> Embeddings:
        moved = {name: to_device(v, self.device) if isinstance(v, torch.Tensor) else v for name, v in features.items()}
        remember_host(cast(torch.Tensor, moved["attention_mask"]), features["attention_mask"])
        batch = cast(Features, {**moved, "heads": heads})
        if dtype is None:
            return self._kept(self.adapter.encode(self._engine.of(self.model), batch))
        if dtype is torch.int8:
            return self._kept(self.adapter.encode(self._in_int8(), batch))
        with torch.autocast(self.device.type, dtype):
            return self._kept(self.adapter.encode(self.casts.of(self.model, dtype), batch))

    def _in_int8(self) -> nn.Module:
        if self._int8 is None:
            raise UsageError(
                f"this encoder of {self.adapter.describe()} has nothing that is quantised: load a quantised checkpoint "
                "with precision='int8'"
            )
        return self._int8.of(self.model)

    def _kept(self, found: Embeddings) -> Embeddings:
        """Without the smaller lexical weights of a text that has more than `max_active_dims`; training has them all."""
        most = self.settings.max_active_dims
        return found if most is None or found.sparse is None else replace(found, sparse=greatest(found.sparse, most))

    def _pooled(self, found: Embeddings, kind: Kind | None) -> Embeddings:
        """With fewer token vectors of passages, where `token_pooling` says so; training has them all."""
        factor = self.settings.token_pooling
        if factor is None or kind == "query":
            return found
        return pooled(found, factor, self.settings.normalize is not False)

    def checked_heads(self, heads: Sequence[str] | None) -> tuple[str, ...]:
        if heads is None:
            return self.heads
        if not isinstance(heads, Iterable):
            raise UsageError(f"heads is {heads!r}; give names of heads, such as ['dense']")
        chosen = (heads,) if isinstance(heads, str) else tuple(heads)
        for head in chosen:
            if head not in self.heads:
                known = ", ".join(self.heads)
                missing = "has no weights here" if head in self.adapter.declared.heads else "is unknown"
                raise UsageError(f"head '{head}' {missing}{did_you_mean(head, self.heads)} (this model has: {known})")
        return chosen
