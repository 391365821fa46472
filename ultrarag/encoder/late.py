"""LateEncoder: encodes queries by what a compiled encoder left behind, and loads the model when more is asked of it.

Until then neither torch nor transformers is imported, which is most of what a search from the shell takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.checkpoint import Manifest, read_manifest
from ultrarag.encoder.cuts import Cuts
from ultrarag.encoder.engines import AUTO, OPENVINO, Ready, ReadyQueries, asked_engine, is_int8, remembered_winner
from ultrarag.errors import IndexStateError
from ultrarag.plugins import registry
from ultrarag.types import Embeddings, Kind, Passage

if TYPE_CHECKING:
    from ultrarag.encoder.encoder import Encoder
    from ultrarag.encoder.shared import SharedEncoder
    from ultrarag.encoder.turns import Clock, Lane

#: The hooks that nobody calls then, so no extension may be around them.
_HOOKS = ("load", "encode")


def late_encoder(folder: Path, fingerprint: str, precision: str, load: Callable[[], Encoder]) -> LateEncoder | None:
    """The encoder of a checkpoint on a CPU; None where nothing was left behind that it can begin with.

    Args:
        fingerprint, precision: of the encoder that is wanted; of another one nothing is taken.
        load: loads the model.

    Raises:
        CheckpointError: the manifest is damaged, or a file that it lists.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.fingerprint != fingerprint or manifest.sides or manifest.remote_code:
        return None
    if any(registry().wrapping(hook) for hook in _HOOKS):
        return None
    asked = OPENVINO if is_int8(precision) else asked_engine(None)
    settings = manifest.settings.to_dict()

    def fits(record: Ready) -> bool:
        engine = remembered_winner(fingerprint, record.threads) if asked == AUTO else asked
        return engine == OPENVINO and record.settings == settings

    ready = ReadyQueries.read(fingerprint, precision, folder, fits)
    return None if ready is None else LateEncoder(manifest, precision, ready, load)


class LateEncoder:
    """Stands for an `Encoder`, which is loaded by the first use of anything but what is here."""

    def __init__(self, manifest: Manifest, precision: str, ready: ReadyQueries, load: Callable[[], Encoder]) -> None:
        self.settings, self.precision, self.device = manifest.settings, precision, "cpu"
        self.fingerprint = self.query_fingerprint = self.passage_fingerprint = manifest.fingerprint
        self.heads, self.trust_remote_code = manifest.settings.heads, False
        self._ready, self._load = ready, load
        self._mutex = threading.Lock()
        self._loaded: Encoder | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling look for
            raise AttributeError(name)
        return getattr(self.loaded(), name)

    def loaded(self) -> Encoder:
        """The encoder itself, loaded once."""
        with self._mutex:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def queries(self, texts: Sequence[Any], heads: Sequence[str] | None, cuts: Cuts) -> Embeddings | None:
        """The dense vectors of queries; None where more is asked for, or the model is loaded anyway."""
        if self._loaded is not None or tuple(heads or self.heads) != ("dense",) or not all(map(_is_text, texts)):
            return None
        dense, cut = self._ready.dense([self.settings.render(text, "query") for text in texts])
        cuts.add(cut, len(texts), "texts", self._ready.record.limit)
        return Embeddings(dense=dense)


class LateShared:
    """A `SharedEncoder` of a `LateEncoder`: made when the encoder is loaded."""

    def __init__(self, encoder: LateEncoder, clock: Clock, precisions: Mapping[Lane, str] | None) -> None:
        self._encoder, self._arguments = encoder, (clock, precisions)
        self._mutex = threading.Lock()
        self._shared: SharedEncoder | None = None
        self._closed = False

    def encode(
        self,
        texts: str | Passage | Sequence[str | Passage],
        kind: Kind = "passage",
        *,
        heads: Sequence[str] | None = None,
        cuts: Cuts | None = None,
        **options: Any,
    ) -> Embeddings:
        """As of `SharedEncoder`."""
        counted = cuts or Cuts()
        asked = texts if kind == "query" and not options and isinstance(texts, list) else []
        if asked and (found := self._encoder.queries(asked, heads, counted)) is not None:
            if cuts is None:
                counted.tell()
            return found
        return self._made().encode(texts, kind, heads=heads, cuts=cuts, **options)

    def close(self) -> None:
        """Take no more texts."""
        with self._mutex:
            self._closed = True
            if self._shared is not None:
                self._shared.close()

    def _made(self) -> SharedEncoder:
        from ultrarag.encoder.shared import SharedEncoder

        with self._mutex:
            if self._closed:
                raise IndexStateError("this encoder was closed; it takes no more texts")
            if self._shared is None:
                self._shared = SharedEncoder(self._encoder.loaded(), *self._arguments)
            return self._shared


def _is_text(text: object) -> bool:
    """Whether it can be tokenized; of what cannot, the encoder itself tells."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
