"""LiveIndex: hybrid search over passages whose encoder can be exchanged while it answers, and nothing is ever lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve.adding import add
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.exchange import Exchange
from ultrarag.retrieve.export import corpus_vectors
from ultrarag.retrieve.handles import Handle, join, leave
from ultrarag.retrieve.opening import absolute, close_core, create_index, open_core
from ultrarag.retrieve.passages import OnExisting, Written
from ultrarag.retrieve.refreshes import Refreshes
from ultrarag.retrieve.status import describe
from ultrarag.retrieve.waiting import AsyncMethods, Waiting
from ultrarag.types import Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encode import CorpusVectors
    from ultrarag.encoder import Encoder


class LiveIndex(AsyncMethods, Exchange, Refreshes):
    """An index of passages that this process owns; every method may be called from any thread.

    A write that returned is on the disk. One process owns an index at a time; others may call
    `ultrarag.retrieve.read_status` and `read_passages`.

    Example:
        >>> from ultrarag.retrieve import LiveIndex
        >>> live = LiveIndex.create(folder, encoder)
        >>> live.add([{"id": "1", "text": "Milvus is a vector database.", "metadata": {"lang": "en"}}])
        Written(added=1, changed=0, metadata=0, unchanged=0)
        >>> [hit.id for hit in live.search("what is milvus?", filter={"lang": "en"})]
        ['1']
        >>> live.close()
    """

    def __init__(self, core: Core, shared: Handle | None = None) -> None:
        """Use `create` or `open`."""
        self._owned, self._owner, self._shared = core, os.getpid(), shared
        self._refreshing = threading.Lock() if shared is None else shared.refreshing
        self._left = False
        self._log_lock = threading.Lock()
        self._threads = Waiting()

    def __repr__(self) -> str:
        return f"LiveIndex({str(self._owned.layout.root)!r})"

    @property
    def _core(self) -> Core:
        """The parts of the index, which the process that opened it alone may use."""
        if os.getpid() != self._owner:
            raise IndexStateError(
                f"'{self._owned.layout.root}' was opened by process {self._owner}, and process {os.getpid()} is its "
                f"fork: an index has one owner, whose files and threads a fork does not have; open it after forking, "
                f"in one process, or share it through a server (docs/shared-index.md)"
            )
        if self._left:
            raise IndexStateError(f"this handle of '{self._owned.layout.root}' was closed; open it again")
        return self._owned

    @property
    def _waiting(self) -> Waiting:
        """The threads of the async methods, which a fork does not have."""
        _ = self._core
        return self._threads

    def __reduce__(self) -> Any:
        raise IndexStateError(
            f"'{self._owned.layout.root}' is open, and an open index cannot be pickled or copied: send its path, and "
            f"let one process open it"
        )

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str] | None = None,
        encoder: Encoder | None = None,
        *,
        uri: str | None = None,
        checkpoints: str | os.PathLike[str] | None = None,
        backend: str | None = None,
        heads: Sequence[str] | None = None,
        bm25: bool = True,
    ) -> LiveIndex:
        """Create an empty index and open it; it appears whole or not at all.

        Args:
            path: a directory that does not exist or is empty; may be left out with `uri`.
            uri: "qdrant://host:6333/name" or "milvus://host:19530/name" for an index in that server which many
                processes share (docs/shared-index.md); `path` then holds this process's mirror of it.
            checkpoints: for a shared index: a folder that all its processes see; default: in `path`, which suits
                processes on one machine.
            encoder: needed; its checkpoint is copied into the index, so the original may be moved or deleted.
            backend: the vector engine: "qdrant-edge", "ivf" or "numpy", whose vectors lie in the index, or a server, as
                "qdrant://host:6333" or "milvus://host:19530" (docs/backends.md); default: the first embedded one that
                is installed.
            heads: the heads to store; default: all that the encoder has.
            bm25: also index the words, as the head "bm25"; it suits every encoder.

        Raises:
            UsageError: for an unknown backend or head, or an encoder without vectors.
            IndexStateError: when the directory holds something.
        """
        if encoder is None or (path is None and uri is None):
            raise UsageError("LiveIndex.create needs an encoder, and a path or a uri")
        root = create_index(path, encoder, uri, checkpoints, backend, heads, bm25)
        return cls.open(root, encoder)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        encoder: Encoder | None = None,
        *,
        uri: str | None = None,
        checkpoints: str | os.PathLike[str] | None = None,
        device: str | None = None,
        repair: bool = False,
        share: bool = False,
        trust_remote_code: bool = False,
        late: bool = False,
    ) -> LiveIndex:
        """Open an index; writes that a crash kept from the vectors are applied first.

        Where nothing can be written (a read-only folder, a full disk) it is opened for reading, with a warning: it
        answers searches, and refuses writes. Several processes may read so; an owner is not let in meanwhile.

        Args:
            path: its directory; with `uri` a missing one is made, and it may be left out.
            uri: of a shared index, of which the directory is, or becomes, this process's mirror.
            checkpoints: of a shared index: the folder with its checkpoints, if it has another path on this machine.
            encoder: the live generation's, if it is loaded already; default: its copy in the index is loaded.
            device: where to load it, such as "cuda".
            repair: where the vectors are damaged, encode all passages again.
            share: where this process has it open with `share` already, return another handle of the same; it is closed
                with the last one. Other arguments than the first time are refused. Other processes are not let in:
                for those, put it into a server (docs/shared-index.md) or use one process as a service.
            trust_remote_code: run Python code that comes with the live encoder, from now on, also when it is opened
                again: for a new mirror of a shared index, to which nobody's consent elsewhere is handed on.
            late: for a process of few queries: begin with what an engine left behind of the encoder (docs/speed.md),
                which takes a fifth of the time, and load the model when more than dense vectors of queries is wanted.
                Where nothing was left behind it is loaded at once.

        Raises:
            ResourceError: when the machine does not allow it now: too few file descriptors, or files this user may not
                read; nothing is damaged then.
            IndexStateError: when there is no index, another process owns it (named), or a file is damaged (named).
            FingerprintError: when `encoder` is not the live generation's.
            CheckpointError: when the copy of the checkpoint is damaged.
        """
        if path is None and uri is None:
            raise UsageError("LiveIndex.open needs a path or a uri")
        given: dict[str, Any] = {"encoder": encoder, "uri": uri, "device": device, "repair": repair}
        given |= {"checkpoints": absolute(checkpoints), "trust_remote_code": trust_remote_code, "late": late}
        if not share:
            return cls(open_core(path, **given))
        place = uri if path is None and uri is not None else str(Path(path or "").resolve())
        handle = join(place, given, lambda: open_core(path, **given))
        return cls(handle.core, handle)

    def __enter__(self) -> LiveIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End a running build (it can be taken up again), let searches finish, and flush; twice is harmless."""
        if os.getpid() == self._owner:  # a fork has nothing of its own to close, and must not close its parent's
            if self._left:
                return
            self._threads.close()
            self._close_log()
            if self._shared is None:
                close_core(self._owned)
            else:
                self._left = True
                leave(self._shared, lambda: close_core(self._owned))

    @property
    def path(self) -> Path:
        """The index directory."""
        return self._core.layout.root

    @property
    def encoder(self) -> Encoder:
        """The encoder of the searches: the live generation's, or that of a bridge over it."""
        return self._core.serving.encoder

    @property
    def fingerprint(self) -> str:
        """Of `encoder`."""
        return self._core.serving.fingerprint

    def __len__(self) -> int:
        """The number of passages."""
        _ = self._core.live
        return self._core.store.count()

    def add(
        self,
        passages: Iterable[Passage | Mapping[str, Any]],
        *,
        on_existing: OnExisting = "replace",
        embeddings: Embeddings | None = None,
        fingerprint: str | None = None,
    ) -> Written:
        """Insert passages, or replace those with the same id; what is returned for is durable and can be searched.

        A text that did not change is not encoded again, also when its metadata did. Of an id twice in one call the
        last wins. Passages are written 512 at a time: when a later one is refused, those before it are kept.

        Args:
            passages: Passages, or mappings with `id`, `text` and maybe `title` and `metadata` (JSON; `jsonable` makes
                it of Python's values). Any string but the empty one is an id. Texts may be of any length; the encoder
                sees as many tokens as it takes, BM25 sees all.
            on_existing: what becomes of passages whose id is there: "replace"; "skip" leaves those that are there as
                they are, counted as unchanged, and of an id twice in one call the first wins; "fail" adds all or none,
                in one transaction. Other writes cannot come between looking and writing.
            embeddings: the passages' vectors, a row each, with exactly the heads that are stored: they are not encoded
                then. After a swap other vectors are made of the texts, as of all.
            fingerprint: of the encoder that made them, which must be the live one, or of its passage side.

        Raises:
            DataError: for a passage that no index can hold, such as one with lone surrogates, and for a blank one: no
                visible character in title and text; names its id.
            ExistsError: with "fail", when a passage exists, or is twice in the call; names it.
            FingerprintError: when the vectors are another encoder's.
            UsageError: for vectors of other heads, widths or lengths than the index has, or that are not finite.
            IndexStateError: when the disk is full, or the index was closed.
        """
        return add(self._core, passages, on_existing, embeddings, fingerprint)

    upsert = add

    def retry(self) -> dict[str, str]:
        """Encode the passages again that could not be encoded (`status()["live"]["unencoded"]`).

        Such a passage is stored and its words can be searched; it has no vectors. To change or delete it cures it too.

        Returns:
            id -> reason, of those that still cannot be.
        """
        return self._core.retry()

    def corpus_vectors(
        self, folder: str | os.PathLike[str] | None = None, heads: Sequence[str] | None = None
    ) -> CorpusVectors:
        """Read the vectors of all passages that have some, for training against them; writes and searches go on.

        Args:
            folder: where they are written, in the form of `ultrarag data encode`, and mapped from; a new one. It
                appears whole or not at all. Default: they are held in memory.
            heads: default: all that are stored.

        Raises:
            UsageError: for a head that is not stored.
            DataError: there are no passages.
            IndexStateError: other vectors went live meanwhile.
        """
        return corpus_vectors(self._core, None if folder is None else Path(folder), heads)

    def vacuum(self) -> None:
        """Remove the files of retired generations, old log entries and tombstones, and compact the databases."""
        with self._core.flipping, self._core.leading():
            self._core.vacuum()

    def status(self) -> dict[str, Any]:
        """Plain JSON values: passages, generations with their states, progress of a build, owner, bytes on disk.

        `read_only` says why nothing can be written, where that is so. `refresh` says of the refresh that runs: its
        stage ("prepare", "finetune", "build", "swap"), the step of how many (of a build: passages), the loss that the
        training logged last and its `loss_step`, the seconds that are left of the stage (None where unknown), and
        whether it was cancelled; None where none runs.
        """
        _ = self._core.live
        found = describe(self._core.layout, self._core.store)
        found["read_only"] = self._core.reading or None
        found["refresh"] = None if (running := self._core.running) is None else running.describe()
        if (link := self._core.link) is not None and (watcher := self._core.watcher) is not None:
            found["shared"] = {**link.describe(), "error": watcher.error}
        return found
