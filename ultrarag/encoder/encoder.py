"""Encoder: a model with its adapter, from texts to Embeddings; loads, encodes, scores and saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import nn

from ultrarag.checkpoint import (
    Identity,
    Training,
    check_replaceable,
    fingerprint,
    local_folder,
    publish,
    read_manifest,
)
from ultrarag.encoder.adapted import base_of, joined, merge_matrices
from ultrarag.encoder.choice import adapter_name
from ultrarag.encoder.cuts import Cuts
from ultrarag.encoder.engine_of import engine_of, int8_of, keep_ready
from ultrarag.encoder.engines import INT8, copy_quantised, is_int8
from ultrarag.encoder.forward import TokenEncoder
from ultrarag.encoder.load import (
    check_int8,
    check_vocabulary,
    declared_options,
    dtype_of,
    override_settings,
    settings_of,
)
from ultrarag.encoder.pairs import score_pairs, score_texts, tokenize_pairs
from ultrarag.encoder.sides import SIDES, SidedAdapter, Sides, join, sides_of
from ultrarag.encoder.tokens import check_count, listed_texts, tokenized_chunks
from ultrarag.errors import UsageError
from ultrarag.hookspecs import LoadOptions
from ultrarag.io import progress_bar, quiet_progress
from ultrarag.packages import quiet_deepspeed
from ultrarag.plugins import registry
from ultrarag.scores import head_scores
from ultrarag.types import KINDS, Embeddings, Kind, Passage, Tokens, head_weights
from ultrarag.untrusted import check_folder, code_refused

if TYPE_CHECKING:
    from os import PathLike

    from ultrarag.encoder.low_rank import LowRank
    from ultrarag.maps import LinearMap

logger = logging.getLogger("ultrarag")

#: Texts tokenized and sorted by length together; the next chunk is tokenized while one is encoded.
CHUNK_TEXTS = 4096


class Encoder(TokenEncoder):
    """A loaded model that turns texts into `Embeddings`.

    Example:
        >>> from ultrarag import Encoder
        >>> encoder = Encoder.load(model_path, adapter="bge")
        >>> encoder.encode(["what is milvus?"], kind="query").dense.shape
        (1, 384)
    """

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        adapter: str | None = None,
        *,
        heads: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        engine: str | None = None,
        options: LoadOptions | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> Encoder:
        """Load a model folder or hub name.

        Args:
            adapter: name of the plugin; default: what the manifest of a checkpoint of ours says, else the adapter that
                claims the folder (docs/plugins.md), which is told once.
            heads: only these heads; default: all that have weights.
            precision: fp32, bf16, fp16, or auto (the fastest of these that the device is made for), used by `encode`;
                weights stay in float32. int8: what `ultrarag checkpoint quantise` made, on a CPU.
            engine: what runs the model on a CPU in float32: torch, openvino (a package; docs/speed.md), or auto, the
                faster of the two here; a model that it cannot run, or not alike, is run by torch, which is told once.
                Default: the environment variable ULTRARAG_ENGINE, else torch. Training is always torch's.
            options: everything else that a loader may be told.
            trust_remote_code: run Python code that comes with the model, now and whenever this encoder is loaded again:
                when it is saved, from an index's copy, by its builders and workers.
            settings: fields of EncoderSettings to set in place of what the checkpoint declares, such as
                `query_instruction` or `passage_max_length`.

        Raises:
            UsageError: unknown folder or setting; no adapter claims the folder, several do, or the one that is named
                cannot be right; an engine whose package is missing, or that is not for this device and precision.
            CheckpointError: files missing or damaged, or a head without weights.
        """
        options = options or LoadOptions()
        if heads is not None:
            options = replace(options, heads=tuple(heads))
        if trust_remote_code:
            options = replace(options, trust_remote_code=True)
        folder = local_folder(str(path), options.cache_dir, options.token)
        check_folder(folder)
        if is_int8(precision):
            device = device or "cpu"
            check_int8(options, engine)
        if base := base_of(folder, options):
            known = adapter or (found.adapter if (found := read_manifest(base)) else None)
            with joined(folder, base) as place:
                encoder = cls._load(place, known, device, precision, options, settings)
            merge_matrices(encoder.model, folder)
        else:
            encoder = cls._load(folder, adapter, device, precision, options, settings)
        if is_int8(precision):
            encoder._int8 = int8_of(encoder, folder, lambda: encoder.fingerprint)
            encoder.precision = encoder._int8.record.precision
        elif not options.training:
            encoder._engine = engine_of(encoder, engine, lambda: encoder.fingerprint)
        keep_ready(encoder, lambda: encoder.fingerprint)
        return encoder

    @classmethod
    def _load(
        cls,
        folder: Path,
        adapter: str | None,
        device: str | torch.device | None,
        precision: str,
        options: LoadOptions,
        settings: dict[str, Any],
    ) -> Encoder:
        manifest = read_manifest(folder)
        if manifest and manifest.remote_code and not options.trust_remote_code:
            raise code_refused(folder)
        plugin = registry().adapter(adapter_name(adapter, manifest, folder))
        if (folder / SIDES).is_file():
            plugin = SidedAdapter.around(plugin)
        if not (manifest and manifest.adapter == plugin.name):
            manifest = None
        elif manifest.sides is None:  # sides declare it themselves, and may differ in it
            options = declared_options(options, manifest.settings)
        quiet_deepspeed()
        with quiet_progress():
            model = plugin.load(str(folder), options)
        check_vocabulary(model, folder)
        found = settings_of(model, plugin, options, manifest)
        override_settings(found, settings)
        encoder = cls(plugin, model, found, manifest, device, precision)
        encoder.trust_remote_code = options.trust_remote_code
        return encoder

    @classmethod
    def of_sides(
        cls,
        passage: Encoder,
        query: Encoder | None = None,
        *,
        query_maps: Sequence[LinearMap] = (),
        passage_maps: Sequence[LinearMap] = (),
        low_rank: LowRank | None = None,
    ) -> Encoder:
        """An asymmetric encoder: the passage side of one, the query side of another, and maps behind each.

        The models are shared with the encoders that are given, not copied. Maps that a side has already stay, and come
        first.

        Args:
            query: default: the same as `passage`, so that maps alone tell the sides apart.
            low_rank: what LoRA made of the passages' model for queries, in place of the model of `query`: a checkpoint
                then holds one model, and these matrices.

        Raises:
            UsageError: the sides cannot be compared (adapters, heads, tokenizers or dimensions), or read pairs.
        """
        query = query or passage
        adapter = SidedAdapter.around(passage.adapter)
        if query.adapter.name != adapter.name:
            raise UsageError(
                f"the sides of a model have one adapter: the query side is of '{query.adapter.name}', the passage side "
                f"of '{adapter.name}'"
            )
        left, right = (sides_of(item.model, item.settings) for item in (passage, query))
        model = join(left, right, query_maps, passage_maps, low_rank)
        found = cls(adapter, model, replace(model.settings), None, passage.device, passage.precision)
        found.trust_remote_code = passage.trust_remote_code or query.trust_remote_code
        found.check_widths()
        return found

    def side(self, kind: Literal["query", "passage"]) -> Encoder:
        """One side by itself, a symmetric encoder, without the side's maps; it shares the model."""
        if not isinstance(self.model, Sides):
            return self
        plain = cast(SidedAdapter, self.adapter).plain
        settings = self.model.side_settings(kind)
        encoder = Encoder(plain, self.model.side(kind), settings, None, self.device, self.precision)
        encoder.trust_remote_code = self.trust_remote_code
        return encoder

    def around(self, model: nn.Module) -> Encoder:
        """An encoder of the same adapter, settings and device around another model, such as this one loaded again."""
        encoder = Encoder(self.adapter, model, replace(self.settings), device=self.device)
        encoder.trust_remote_code = self.trust_remote_code
        return encoder

    def in_int8(self, folder: str | PathLike[str]) -> Encoder:
        """An encoder of the same model in int8, as it was quantised beside a checkpoint; the model is shared.

        Raises:
            UsageError: what is quantised there is of another model, or nothing is.
            CheckpointError: its files are damaged.
        """
        found = self.around(self.model)
        found.precision = INT8
        found._int8 = int8_of(found, Path(folder), lambda: self.fingerprint)
        found.precision = found._int8.record.precision
        return found

    @property
    def asymmetric(self) -> bool:
        """Whether queries and passages are encoded differently by weights or maps, not by their instructions alone."""
        return isinstance(self.model, Sides)

    @property
    def query_maps(self) -> tuple[LinearMap, ...]:
        """The maps of the query side, in the order in which they are applied."""
        return self.model.maps_of("query") if isinstance(self.model, Sides) else ()

    @property
    def passage_maps(self) -> tuple[LinearMap, ...]:
        """The maps of the passage side, in the order in which they are applied."""
        return self.model.maps_of("passage") if isinstance(self.model, Sides) else ()

    def check_widths(self) -> None:
        """Raise UsageError where the sides' dense vectors differ in width, or a map does not fit."""
        heads = tuple(head for head in ("dense", "colbert") if head in self.heads)
        if not heads:
            return
        try:
            query, passage = (self.encode(["width"], kind, heads=heads, progress=False) for kind in KINDS[:2])
        except RuntimeError as error:
            raise UsageError(f"a map does not fit the vectors of its side: {error}") from error
        for head in heads:
            widths = [getattr(side, head).shape[-1] for side in (query, passage)]
            if widths[0] != widths[1]:
                raise UsageError(
                    f"the sides' {head} vectors cannot be compared: queries have {widths[0]} dimensions, passages "
                    f"{widths[1]}"
                )

    def compile(self, **options: Any) -> None:
        """Let torch.compile speed the backbone up; it then computes padding too, and the first batches are slow.

        Worth it for long jobs on a GPU; benchmarks/encode.py --compile measures from how many texts on.

        Args:
            options: of `torch.compile`; `dynamic=True` unless said otherwise, for batches differ in length.

        Raises:
            UsageError: the model has no `backbone`.
        """
        backbones = {getattr(self.reader(kind), "backbone", None) for kind in KINDS[:2]}
        if not all(isinstance(backbone, nn.Module) for backbone in backbones):
            raise UsageError(f"the model of {self.adapter.describe()} has no part called 'backbone' to compile")
        self.casts.stop()  # a compiled backbone casts in its own code
        for backbone in cast("set[nn.Module]", backbones):
            backbone.compile(**{"dynamic": True, **options})

    @cached_property
    def dim(self) -> int | None:
        """Width of the dense vectors; None for a model without them."""
        if "dense" not in self.heads:
            return None
        return int(self.encode(["dimension"], heads=("dense",), progress=False).dense.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """The model's identity, computed from its content; a warning where the manifest says otherwise."""
        found = self.known_identity.fingerprint
        if self.manifest and self.manifest.fingerprint not in ("", found) and self.manifest.settings == self.settings:
            logger.warning(
                "the model's content changed since its manifest was written: its identity is now %s", found[:12]
            )
        return found

    @property
    def query_fingerprint(self) -> str:
        """The identity of what queries are encoded by; of a symmetric model, `fingerprint`."""
        return self.known_identity.query if self.asymmetric else self.fingerprint

    @property
    def passage_fingerprint(self) -> str:
        """The identity of what passages are encoded by; of a symmetric model, `fingerprint`."""
        return self.known_identity.passage if self.asymmetric else self.fingerprint

    @cached_property
    def known_identity(self) -> Identity:
        """The model's identity and its sides', as computed once."""
        return self.identity()

    def identity(self) -> Identity:
        """The model's identity and its sides', computed anew."""
        if isinstance(self.model, Sides):
            return self.model.identity(self.adapter.name)
        return Identity(fingerprint(self.model, self.adapter.name, self.settings))

    def encode(
        self,
        texts: str | Passage | Sequence[str | Passage],
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
            texts: texts, or passages whose titles go where the model's prompt has a place for them (EmbeddingGemma's
                "title: none | text: "), else before the text.
            kind: "query" or "passage": which side of the model, which instruction and which length limit apply; "text"
                for a symmetric task, where all texts are read alike: no instruction but the one given.
            heads: the heads to compute; default: all that the model has.
            batch_tokens: padded tokens per forward.
            precision: fp32, bf16, fp16, int8 or auto; default: the encoder's.
            instruction: in place of the declared one, for this call.
            progress: a bar on stderr; default: on a terminal, after two seconds.
            cuts: counts the texts that were cut, for a caller of many calls; default: they are logged.

        Returns:
            Embeddings: `dense` (n, dim) float32; `sparse` ids and weights (n, tokens); `colbert`
            (n, tokens, dim) with `mask`.

        Raises:
            UsageError: an unknown head or kind, or a text that is no string.
        """
        texts = listed_texts(texts)
        if not texts:
            return self.encode([""], kind, heads=heads, progress=False)[:0]
        options: dict[str, Any] = {"heads": heads, "batch_tokens": batch_tokens, "precision": precision, "cuts": cuts}
        options |= {"max_length": max_length, "instruction": instruction}
        if len(texts) == 1 and not progress:
            return self._encode_one(texts, kind, **options)
        with progress_bar(len(texts), "encode", "text", progress) as bar:
            return Embeddings.cat(list(self.iter_encode(texts, kind, on_batch=bar.update, **options)))

    def _encode_one(
        self,
        texts: Sequence[str | Passage],
        kind: Kind,
        heads: Sequence[str] | None,
        batch_tokens: int | None,
        precision: str | None,
        cuts: Cuts | None,
        max_length: int | None,
        instruction: str | None,
    ) -> Embeddings:
        """One text: no bar, no chunks and no batches, which take as long as a fifth of a query."""
        self._check(kind, instruction, batch_tokens)
        chosen, dtype = self.checked_heads(heads), dtype_of(precision or self.precision, self.device)
        tokens = self.tokenize(texts, kind, max_length, instruction)
        if tokens.truncated or cuts is not None:
            counted = cuts or Cuts()
            counted.add(tokens.truncated, 1, "texts", self.max_length(kind, max_length))
            if cuts is None:
                counted.tell()
        return self.encode_tokens(tokens, chosen, dtype=dtype)

    def _check(self, kind: Kind, instruction: str | None, batch_tokens: int | None) -> None:
        self.check_kind(kind)
        if instruction is not None and not isinstance(instruction, str):
            raise UsageError(f"instruction is {type(instruction).__name__}, not a string")
        if batch_tokens is not None:
            check_count("batch_tokens", batch_tokens)

    def iter_encode(
        self,
        texts: Iterable[str | Passage],
        kind: Kind = "passage",
        *,
        heads: Sequence[str] | None = None,
        batch_tokens: int | None = None,
        precision: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        chunk_texts: int = CHUNK_TEXTS,
        on_batch: Callable[[int], object] | None = None,
        cuts: Cuts | None = None,
    ) -> Iterator[Embeddings]:
        """Yield the embeddings of `chunk_texts` texts at a time, in order, for corpora larger than memory.

        The next chunk is tokenized in a thread while one is encoded.

        Args:
            on_batch: told the number of texts after each forward (a progress bar's `update`, say).
        """
        self._check(kind, instruction, batch_tokens)
        read = partial(self.tokenize, kind=kind, max_length=max_length, instruction=instruction)
        options: dict[str, Any] = {"heads": heads, "batch_tokens": batch_tokens, "precision": precision}
        options |= {"on_batch": on_batch, "cuts": cuts}
        length = self.max_length(kind, max_length)
        yield from self.encode_chunks(tokenized_chunks(texts, read, chunk_texts), "texts", length, **options)

    def check_kind(self, kind: Kind) -> None:
        """Raise UsageError where the model has no vectors for texts of this kind; says why."""
        if kind not in KINDS:
            raise UsageError(f"kind is '{kind}'; it must be 'query', 'passage', or 'text' for a symmetric task")
        if kind == "text" and self.asymmetric:
            raise UsageError(
                "the model's query side and passage side differ, so it has none for kind 'text': compare texts of one "
                "side (kind='passage' for all), or queries with passages"
            )
        if self.adapter.declared.pair_input:
            raise UsageError(
                f"{self.adapter.describe()} reads (query, passage) pairs and gives no vectors: "
                "use encoder.score([(query, passage), ...])"
            )

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
        chosen = self._weights(weights)
        encode = partial(self.encode, heads=tuple(chosen), **options)
        return score_texts(pairs, encode, partial(self.similarity, weights=chosen))

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
        self.checked_heads(tuple(given))
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
            UsageError: `path` holds what is no model.
        """
        check_replaceable(Path(path))
        record = training or (self.manifest.training if self.manifest else None)
        found = publish(self, Path(path), self.model.state_dict(), record)
        if self._int8 is not None:
            copy_quantised(self._int8.folder, found)
        return found
