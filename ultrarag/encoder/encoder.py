"""Encoder: a model with its adapter, from texts to Embeddings; loads, encodes, scores and saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from ultrarag.checkpoint import Manifest, Training, fingerprint, local_folder, read_manifest
from ultrarag.encoder.device import map_side_by_side, one_ahead, side_by_side
from ultrarag.encoder.load import (
    PRECISIONS,
    adapter_name,
    checked_precision,
    declared_options,
    override_settings,
    settings_of,
)
from ultrarag.encoder.pairs import score_pairs, score_texts, tokenize_pairs
from ultrarag.encoder.precision import Casts
from ultrarag.encoder.tokens import (
    Cuts,
    batches_by_tokens,
    check_texts,
    effective_length,
    pad,
    render,
    token_limit,
    tokenize,
    tokenized_windows,
)
from ultrarag.errors import UsageError, did_you_mean
from ultrarag.hookspecs import Features, LoadOptions
from ultrarag.io import progress_bar, quiet_progress
from ultrarag.plugins import Adapter, registry
from ultrarag.scores import head_scores
from ultrarag.transfer import remember_host, to_device, to_host
from ultrarag.types import Embeddings, EncoderSettings, Kind, Tokens, head_weights

if TYPE_CHECKING:
    from os import PathLike

logger = logging.getLogger("ultrarag")

#: Padded tokens per forward: small enough for a CPU's caches, large enough for a GPU to be busy.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
#: Texts tokenized and sorted by length together; the next window is tokenized while one is encoded.
WINDOW = 4096


class Encoder:
    """A loaded model that turns texts into `Embeddings`.

    Example:
        >>> from ultrarag import Encoder
        >>> encoder = Encoder.load(model_path, adapter="bge")
        >>> encoder.encode(["what is milvus?"], kind="query").dense.shape
        (1, 384)
    """

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
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.precision = checked_precision(precision, self.device)
        self.model = model.to(self.device).eval()
        model.settings = settings  # type: ignore[assignment]
        #: the model's matrices in lower precision, until it is trained
        self.casts = Casts()

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        adapter: str | None = None,
        *,
        heads: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        options: LoadOptions | None = None,
        **settings: Any,
    ) -> Encoder:
        """Load a model folder or hub name.

        Args:
            adapter: name of the plugin; may be left out for a checkpoint of ours, whose manifest names it.
            heads: only these heads; default: all that have weights.
            precision: fp32, bf16, fp16, or auto (the fastest that the device is made for), used by `encode`; weights
                stay in float32.
            options: everything else that a loader may be told.
            settings: fields of EncoderSettings to set in place of what the checkpoint declares, such as
                `query_instruction` or `passage_max_length`.

        Raises:
            UsageError: unknown folder, adapter missing, unknown setting.
            CheckpointError: files missing or damaged, or a head without weights.
        """
        options = options or LoadOptions()
        if heads is not None:
            options = replace(options, heads=tuple(heads))
        folder = local_folder(str(path), options.cache_dir, options.token)
        manifest = read_manifest(folder)
        plugin = registry().adapter(adapter_name(adapter, manifest, folder))
        if manifest and manifest.adapter == plugin.name:
            options = declared_options(options, manifest.settings)
        else:
            manifest = None
        with quiet_progress():
            model = plugin.load(str(folder), options)
        found = settings_of(model, plugin, options, manifest)
        override_settings(found, settings)
        return cls(plugin, model, found, manifest, device, precision)

    def compile(self, **options: Any) -> None:
        """Let torch.compile speed the backbone up; it then computes padding too, and the first batches are slow.

        Worth it for long jobs on a GPU; benchmarks/encode.py --compile measures from how many texts on.

        Args:
            options: of `torch.compile`; `dynamic=True` unless said otherwise, for batches differ in length.

        Raises:
            UsageError: the model has no `backbone`.
        """
        backbone = getattr(self.model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise UsageError(f"the model of {self.adapter.describe()} has no part called 'backbone' to compile")
        self.casts.stop()  # a compiled backbone casts in its own code
        backbone.compile(**{"dynamic": True, **options})

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that the model has."""
        return self.settings.heads

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.model.tokenizer

    @cached_property
    def dim(self) -> int | None:
        """Width of the dense vectors; None for a model without them."""
        if "dense" not in self.heads:
            return None
        return int(self.encode(["dimension"], heads=("dense",), progress=False).dense.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """The model's identity, computed from its content; a warning where the manifest says otherwise."""
        found = fingerprint(self.model, self.adapter.name, self.settings)
        if self.manifest and self.manifest.fingerprint not in ("", found) and self.manifest.settings == self.settings:
            logger.warning(
                "the model's content changed since its manifest was written: its identity is now %s", found[:12]
            )
        return found

    @property
    def limit(self) -> int | None:
        """The most tokens that the model can take."""
        return token_limit(self.tokenizer, self.model.config)

    def max_length(self, kind: Kind, asked: int | None = None) -> int | None:
        """The token limit for texts of `kind`; raises UsageError when `asked` is more than the model takes."""
        return effective_length(asked, self.settings.max_length(kind), self.limit)

    def tokenize(
        self, texts: Sequence[str], kind: Kind, max_length: int | None = None, instruction: str | None = None
    ) -> Tokens:
        """Render the texts with their kind's instruction and tokenize them.

        Raises:
            UsageError, DataError: a text is no string, or holds what is not text.
        """
        check_texts(texts)
        rendered = render(self.settings, texts, kind, instruction)
        return tokenize(self.tokenizer, rendered, self.max_length(kind, max_length))

    def features(self, tokens: Tokens, rows: Sequence[int] | None = None, multiple_of: int | None = None) -> Features:
        """Pad some rows of tokenized texts or pairs into one batch on the CPU."""
        chosen = tokens.ids if rows is None else [tokens.ids[row] for row in rows]
        types = tokens.types if tokens.types is None or rows is None else [tokens.types[row] for row in rows]
        return pad(chosen, self.tokenizer.pad_token_id, self.tokenizer.padding_side, multiple_of, types)

    def encode(
        self,
        texts: str | Sequence[str],
        kind: Kind = "passage",
        *,
        heads: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        progress: bool | None = None,
        cuts: Cuts | None = None,
    ) -> Embeddings:
        """Return the texts' embeddings as numpy arrays, in the order given.

        Args:
            kind: "query" or "passage": which instruction and length limit apply.
            heads: the heads to compute; default: all that the model has.
            batch_tokens: padded tokens per forward.
            precision: fp32, bf16, fp16 or auto; default: the encoder's.
            instruction: in place of the declared one, for this call.
            progress: a bar on stderr; default: on a terminal, after two seconds.
            cuts: counts the texts that were cut, for a caller of many calls; default: they are logged.

        Returns:
            Embeddings: `dense` (n, dim) float32; `sparse` ids and weights (n, tokens); `colbert`
            (n, tokens, dim) with `mask`.

        Raises:
            UsageError: an unknown head or kind, or a text that is no string.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return self.encode([""], kind, heads=heads, progress=False)[:0]
        with progress_bar(len(texts), "encode", "text", progress) as bar:
            windows = self.iter_encode(
                texts,
                kind,
                heads=heads,
                batch_tokens=batch_tokens,
                precision=precision,
                max_length=max_length,
                instruction=instruction,
                on_batch=bar.update,
                cuts=cuts,
            )
            return Embeddings.cat(list(windows))

    def iter_encode(
        self,
        texts: Iterable[str],
        kind: Kind = "passage",
        *,
        heads: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        window: int = WINDOW,
        on_batch: Callable[[int], object] | None = None,
        cuts: Cuts | None = None,
    ) -> Iterator[Embeddings]:
        """Yield the embeddings of `window` texts at a time, in order, for corpora larger than memory.

        The next window is tokenized in a thread while one is encoded.

        Args:
            on_batch: told the number of texts after each forward (a progress bar's `update`, say).
        """
        if kind not in ("query", "passage"):
            raise UsageError(f"kind is '{kind}'; it must be 'query' or 'passage'")
        self._refuse_pairs()
        read = partial(self.tokenize, kind=kind, max_length=max_length, instruction=instruction)
        options: dict[str, Any] = {"heads": heads, "batch_tokens": batch_tokens, "precision": precision}
        options |= {"on_batch": on_batch, "cuts": cuts}
        length = self.max_length(kind, max_length)
        yield from self._encode_windows(tokenized_windows(texts, read, window), "texts", length, **options)

    def _encode_windows(
        self,
        windows: Iterator[Tokens],
        what: str,
        length: int | None,
        heads: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        precision: str | None = None,
        on_batch: Callable[[int], object] | None = None,
        cuts: Cuts | None = None,
    ) -> Iterator[Embeddings]:
        """Yield the embeddings of each window of tokenized texts or pairs; say in the end how many were cut."""
        chosen = self._checked_heads(heads)
        budget = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        dtype = PRECISIONS[checked_precision(precision or self.precision, self.device)]
        counted = cuts or Cuts()
        for tokens in windows:
            counted.add(tokens.truncated, len(tokens), what, length)
            yield self.encode_tokens(tokens, chosen, budget, dtype, on_batch)
        if cuts is None:
            counted.tell()

    def _refuse_pairs(self) -> None:
        if self.adapter.declared.pair_input:
            raise UsageError(
                f"{self.adapter.describe()} reads (query, passage) pairs and gives no vectors: "
                "use encoder.score([(query, passage), ...])"
            )

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
            dtype: of the forward, if not float32.
            on_batch: told the number of texts after each forward.
        """
        self.model.eval()
        workers = self._workers()
        batches = list(batches_by_tokens([len(row) for row in tokens.ids], budget, workers))

        @torch.no_grad()  # not inference_mode: a buffer first made here may be needed by a later training step
        def start(rows: list[int]) -> Callable[[], Embeddings]:
            return to_host(self._forward(self.features(tokens, rows), heads, dtype))

        if self.device.type == "cpu":
            results = map_side_by_side(lambda rows: start(rows)(), batches, workers)
        else:
            results = one_ahead(start, batches)
        parts, order = [], []
        for rows, part in results:
            parts.append(part)
            order.extend(rows)
            if on_batch:
                on_batch(len(rows))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return Embeddings.cat(parts)[place]

    def _workers(self) -> int:
        """Forwards to run at a time: one on a GPU, and where a plugin does not say that several may run."""
        if self.device.type != "cpu" or not self.adapter.registry.threaded_encode(self.adapter.name):
            return 1
        return side_by_side()

    def _forward(self, features: Features, heads: tuple[str, ...], dtype: torch.dtype | None) -> Embeddings:
        moved = {name: to_device(cast(torch.Tensor, value), self.device) for name, value in features.items()}
        remember_host(moved["attention_mask"], features["attention_mask"])
        batch = cast(Features, {**moved, "heads": heads})
        if dtype is None:
            return self.adapter.encode(self.model, batch)
        with torch.autocast(self.device.type, dtype):
            return self.adapter.encode(self.casts.of(self.model, dtype), batch)

    def _checked_heads(self, heads: Sequence[str] | None) -> tuple[str, ...]:
        if heads is None:
            return self.heads
        chosen = (heads,) if isinstance(heads, str) else tuple(heads)
        for head in chosen:
            if head not in self.heads:
                known = ", ".join(self.heads)
                missing = "has no weights here" if head in self.adapter.declared.heads else "is unknown"
                raise UsageError(f"head '{head}' {missing}{did_you_mean(head, self.heads)} (this model has: {known})")
        return chosen

    def tokenize_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        query_max_length: int | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
    ) -> Tokens:
        """Render (query, passage) pairs and tokenize them as the cross-encoder reads them; passages are cut first.

        Raises:
            UsageError, DataError: the model reads no pairs, or a text is no string, or holds what is not text.
        """
        return tokenize_pairs(self, pairs, query_max_length, max_length, instruction)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        weights: dict[str, float] | None = None,
        normalize: bool = False,
        **options: Any,
    ) -> np.ndarray:
        """Return the relevance of each (query, passage) pair, (n,) float32.

        Args:
            weights: weight per head; required when the model has several, since no weighting suits all data.
            normalize: put a cross-encoder's scores through the logistic function: from 0 to 1.
            options: as for `encode` (batch_tokens, precision, progress, max_length); for a cross-encoder
                `max_length` is the pair's, and `query_max_length` the query's (default: three quarters of it).

        Raises:
            UsageError: weights missing, or for a head that the model lacks.
        """
        if self.adapter.declared.pair_input:
            return score_pairs(self, pairs, weights, normalize, **options)
        if normalize:
            raise UsageError("normalize is for cross-encoders, whose scores are logits; this model compares vectors")
        if isinstance(pairs, Sequence) and not pairs:
            return np.zeros(0, dtype=np.float32)
        return score_texts(self, pairs, self._weights(weights), **options)

    def similarity(self, query: Embeddings, passage: Embeddings, weights: dict[str, float] | None = None) -> np.ndarray:
        """Return the weighted sum of the heads' scores, (queries, passages) float32, of encoded texts."""
        chosen = self._weights(weights)
        with torch.inference_mode():
            matrices = head_scores(query.map(torch.as_tensor), passage.map(torch.as_tensor))
            total = sum(weight * matrices[head] for head, weight in chosen.items())
        return np.asarray(cast(torch.Tensor, total), dtype=np.float32)

    def _weights(self, weights: dict[str, float] | None) -> dict[str, float]:
        if weights is None:
            if len(self.heads) > 1:
                example = ", ".join(f"'{head}': 1" for head in self.heads)
                raise UsageError(f"the model has several heads: say how they weigh, for example {{{example}}}")
            return {self.heads[0]: 1.0}
        given = head_weights(weights)
        self._checked_heads(tuple(given))
        chosen = {head: weight for head, weight in given.items() if weight != 0}
        if not chosen:
            raise UsageError(f"all weights are 0: {weights}; at least one head must count")
        return chosen

    def save(self, path: str | PathLike[str], training: Training | None = None) -> Path:
        """Write a checkpoint that ultrarag, transformers, sentence-transformers and FlagEmbedding load.

        It is written beside `path`, loaded again, compared with this model on probe texts for every head, and
        only then renamed: a reader sees the old checkpoint, or the whole new one.

        Raises:
            CheckpointError: when what was written does not give this model's vectors.
        """
        from ultrarag.checkpoint import publish

        return publish(
            self, Path(path), self.model.state_dict(), training or (self.manifest.training if self.manifest else None)
        )
