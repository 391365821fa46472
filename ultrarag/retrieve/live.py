"""LiveIndex: hybrid search over passages whose encoder can be exchanged while it answers, and nothing is ever lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.evaluation import DEFAULT_METRICS, Evaluation, Qrels, evaluate
from ultrarag.io import named_conditions, publish_directory, staged_directory
from ultrarag.retrieve.adding import add
from ultrarag.retrieve.aside import GenerationSearcher, open_searcher
from ultrarag.retrieve.bridge import BridgeTerms, drop, resume
from ultrarag.retrieve.build import build_generation, end_build
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.export import corpus_vectors
from ultrarag.retrieve.generation import Generation, lay_out, stored_heads
from ultrarag.retrieve.handles import Handle, join, leave
from ultrarag.retrieve.passages import OnExisting, Written
from ultrarag.retrieve.search import Encoding, Hits
from ultrarag.retrieve.shared import check_mirror, create_mirror, create_shared, mirror_path
from ultrarag.retrieve.signals import FROM_FEEDBACK, Signals
from ultrarag.retrieve.status import describe
from ultrarag.retrieve.swap import Flip, Gate, Note, SwapTerms, rollback, swap
from ultrarag.retrieve.waiting import AsyncMethods, Waiting
from ultrarag.types import Embeddings, Passage

if TYPE_CHECKING:
    from ultrarag.encode import CorpusVectors
    from ultrarag.encode.ray import RayPool
    from ultrarag.encoder import Encoder
    from ultrarag.retrieve.refresh import OnProgress, RefreshReport, Trial


class LiveIndex(AsyncMethods, Signals):
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
        root = mirror_path(uri) if path is None and uri is not None else Path(path or "")
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise IndexStateError(
                f"'{root}' is not empty; open the index with LiveIndex.open, or name another directory"
            )
        chosen = stored_heads(encoder.heads, heads)
        with named_conditions(root):
            cls._create(root, encoder, backend, chosen, bm25, uri, checkpoints)
        return cls.open(root, encoder)

    @staticmethod
    def _create(
        root: Path,
        encoder: Encoder,
        backend: str | None,
        heads: tuple[str, ...],
        bm25: bool,
        uri: str | None,
        checkpoints: str | os.PathLike[str] | None,
    ) -> None:
        if uri is not None:
            if backend is not None:
                raise UsageError("backend is for an index of this process alone; the uri says where a shared one is")
            create_shared(root, encoder, uri, _text(checkpoints), heads, bm25)
            return
        if checkpoints is not None:
            raise UsageError("checkpoints is for shared indexes: give a uri, or leave it out")
        with staged_directory(root) as stage:
            lay_out(stage, encoder, backend, heads, bm25)
            publish_directory(stage, root)

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
        given |= {"checkpoints": _text(checkpoints), "trust_remote_code": trust_remote_code}
        if not share:
            return cls(_open_core(path, **given))
        place = uri if path is None and uri is not None else str(Path(path or "").resolve())
        handle = join(place, given, lambda: _open_core(path, **given))
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
                _close(self._owned)
            else:
                self._left = True
                leave(self._shared, lambda: _close(self._owned))

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

    def search(self, query: str, k: int = 10, **options: Any) -> Hits:
        """Return the k best passages, best first; fewer where fewer match.

        The list says which generation answered (`generation`, `fingerprint`), and has a `query_id` of its own.

        Args:
            query: an empty one finds nothing.
            k: may be larger than the corpus.
            weights: weight of each head ("dense", "sparse", "colbert", "bm25"), such as {"dense": 1, "bm25": 0.5}.
                Heads named here are searched. Required when several heads are summed: no default suits all data.
            heads: the heads to search; default: those with a weight, else all that the encoder has.
            filter: a condition on the metadata, applied before the k best are chosen; see
                `ultrarag.retrieve.search.filters`.
            fusion: "weighted" sum, or "rrf" (reciprocal rank fusion, which needs no weights).
            normalize: "minmax" maps each head's scores to 0..1 before they are weighted, "raw" takes them as they
                are. With one head the scores are always its own.
            candidates: hits asked of each head before fusion; default: max(4 k, 100). ColBERT scores the candidates
                of the others; alone, those of dense, sparse or bm25, the first that is stored.
            exact: compare the dense vector with all passages, not through the approximate graph.
            ids: search these passages alone, each of them compared; unknown ones are ignored. With a filter, those of
                them that pass it. "minmax" then maps the scores of these.
            min_scores: what a hit must have at least from a head that is searched, such as {"dense": 0.3}, whatever
                its fused score is: a fused score has no absolute meaning. Each hit's `scores` then has that head's.
            mmr: choose the k out of `candidates` hits by maximal marginal relevance, so that they differ: from 1 (like
                the query) to 0 (unlike each other), by the cosines of the dense vectors. They keep their scores, and
                come in the order in which they were chosen.
            log: remember the search in the feedback log (docs/feedback.md), so that `feedback` can refer to it.
            client: who asks, for the log; kept as a keyed hash.

        Raises:
            UsageError: for arguments that cannot be used; names them and what can.
            IndexStateError: with `log`, when the index is open for reading, or the log is damaged.
        """
        return self.search_many([query], k=k, **options)[0]

    def search_many(
        self, queries: Sequence[str], k: int = 10, *, log: bool = False, client: str | None = None, **options: Any
    ) -> list[Hits]:
        """Search several queries, encoded together, on one generation; options as for `search`."""
        if isinstance(queries, str):
            raise UsageError("search_many takes several queries; use search for one")
        if log:
            self._core.check_writable()  # before the search
        with self._core.searching() as searcher:
            found = searcher.search_many(list(queries), k=k, **options)
        if log:
            self._remember(queries, found, {"k": k, **options}, client)
        return found

    def search_embeddings(self, embeddings: Embeddings, fingerprint: str, k: int = 10, **options: Any) -> list[Hits]:
        """Search with query vectors made elsewhere; options as for `search`.

        Args:
            options: also `texts`, the queries' texts, for the head "bm25" beside those of the vectors.

        Raises:
            FingerprintError: when `fingerprint` is not that of the live encoder.
        """
        with self._core.searching() as searcher:
            return searcher.search_embeddings(embeddings, fingerprint, k=k, **options)

    @contextmanager
    def encoding(self) -> Iterator[Encoding]:
        """Lend the encoder of the searches, to encode texts that are not passages here; it stays the same in the block.

        Example:
            >>> with live.encoding() as lent:
            ...     vectors = lent.encode(["what is milvus?"], "query").dense
            ...     vectors.shape, lent.fingerprint == live.fingerprint
            ((1, 384), True)
        """
        with self._core.searching() as searcher:
            yield searcher.encoding()

    def score(self, query: str, ids: Sequence[str], weights: Mapping[str, float] | None = None, **options: Any) -> Hits:
        """Score given passages for a query, and return all of them, best first.

        A search with `ids` finds those that a head finds; this ranks the others as well, such as passages without a
        word of the query at BM25's 0. Left out are ids that do not exist, and passages that a head has no vectors of
        (`status()["live"]["unencoded"]`).

        Args:
            query: an empty one scores none.
            weights: as for `search`; scores are summed as they are, unless `normalize` or `fusion` say otherwise.
            options: others of `search`, such as `heads`, `filter` and `min_scores`.
        """
        with self._core.searching() as searcher:
            return searcher.score(query, ids, weights=weights, **options)

    def searcher(self, generation: int | Generation) -> GenerationSearcher:
        """Open a generation that is ready, live or previous for searches, whatever is live; for a `with` block.

        It first gets the writes that it lacks (its encoder encodes their passages), unless something is being swapped,
        the index is open for reading, or another process writes to a shared index: then it is searched as it is.
        Models and vectors that another open generation has are shared with it.

        Raises:
            IndexStateError: it is being built, or was removed.

        Example:
            >>> with live.searcher(live.build(checkpoint)) as new:
            ...     pairs = live.search("what is milvus?"), new.search("what is milvus?")
        """
        return open_searcher(self._core, _id(generation))

    def evaluate(
        self,
        queries: Mapping[str, str],
        qrels: Qrels,
        metrics: Sequence[str] = DEFAULT_METRICS,
        k: int | None = None,
        *,
        ignore_identical_ids: bool = False,
        **search: Any,
    ) -> Evaluation:
        """Search judged queries and measure; see `ultrarag.retrieve.evaluate`. None of them is remembered."""
        return evaluate(self, queries, qrels, metrics, k, ignore_identical_ids=ignore_identical_ids, **search)

    def generation(self, generation: int | Generation) -> Generation:
        """Return a generation as it is now."""
        return self._core.catalog.get(_id(generation))

    def build(
        self,
        checkpoint: str | os.PathLike[str] | Encoder,
        *,
        adapter: str | None = None,
        backend: str | None = None,
        heads: Sequence[str] | None = None,
        device: str | None = None,
        threads: int | None = None,
        progress: bool | None = None,
        ray: RayPool | None = None,
        share: bool | None = None,
        bridge: BridgeTerms | None = None,
        trust_remote_code: bool = False,
        precision: str | None = None,
    ) -> Generation:
        """Make a new generation with another encoder, while searches and writes go on.

        Its passages are encoded, unless the vectors that are there are the new encoder's too (a model of which the
        query side alone was tuned): then it shares them, and is built at once. Where its passage side is the live one
        with linear maps behind it, the stored vectors are mapped. `Generation.how_built` says which it was.

        The work is done by a process at low priority, committed chunk by chunk. After a crash, Ctrl-C or `close`,
        building the same encoder again goes on after the last committed chunk; building another one gives that up.
        A generation of this encoder that is ready is returned as it is.

        Args:
            checkpoint: a checkpoint folder, or an Encoder; it is copied into the index.
            adapter: of a folder that is no checkpoint of ultrarag's; default: the one that claims it, and the live
                generation's where several could read it.
            backend, heads: default: the live generation's engine, or "ivf" for many passages in the default engine
                (docs/backends.md), and all heads of the encoder; of vectors that are shared or mapped, those that are
                stored.
            device: default: that of the live encoder.
            threads: of the builder; default: half of the cores.
            progress: a bar on stderr; default: on a terminal.
            ray: encode by the workers of a Ray cluster, which write to a server (docs/distributed.md); the checkpoint
                is then a folder that all nodes see.
            share: True: refuse where stored passages would have to be encoded; False: encode them all; default: encode
                them where it must be.
            bridge: before the passages are encoded, let the new encoder serve from the old vectors, if it is
                significantly better so on these queries (docs/bridge.md). It serves until the swap, or `rollback`.
            trust_remote_code: run Python code that comes with a checkpoint folder; an Encoder says so itself. The index
                remembers it, with the checksums of the code.
            precision: fp32, bf16, fp16 or int8; default: the live generation's, or that of an Encoder. In int8, a
                checkpoint that is not quantised is calibrated on passages of the index.

        Returns:
            the generation, "ready", for `swap`.

        Raises:
            UsageError: there are no vectors to share or map, and `share` is True; says why.
        """
        wishes: dict[str, Any] = {"adapter": adapter, "backend": backend, "heads": heads, "device": device}
        if not isinstance(bridge, BridgeTerms | None):
            raise UsageError(
                f"bridge is {bridge!r}: give BridgeTerms(queries, qrels), the judged queries by which it is decided "
                "(docs/bridge.md); refresh(bridge=True) takes those of its gate"
            )
        wishes |= {"share": share, "bridge": bridge, "trust_remote_code": trust_remote_code, "precision": precision}
        return build_generation(self._core, checkpoint, **wishes, threads=threads, progress=progress, ray=ray)

    def swap(
        self,
        generation: int | Generation,
        gate: Gate | None = None,
        *,
        force: bool = False,
        metric: str = "nDCG@10",
        note: Note | None = None,
        **search: Any,
    ) -> Flip:
        """Make a generation the live one; searches in flight finish on the old one, and none ever waits.

        The generation first gets the writes made since its build, and must be sound: a vector for every passage,
        finite, of the right length, and the same that the encoder gives now. With a gate it must also not be
        significantly worse than the live one.

        Args:
            gate: (queries, qrels): query id -> text, and query id -> passage id -> relevance. Both generations
                answer them, searched in the same way; a paired bootstrap decides. Or a Verdict measured elsewhere.
            force: go live although the gate says no; this is recorded.
            metric: what the gate compares.
            note: is told what the gate measured, before it decides.
            search: options of `evaluate` and `search` for the gate, such as `weights` and `ignore_identical_ids`.

        Raises:
            GateError: when it is refused, with the numbers, or when both generations measure 0; nothing has changed
                then.
            DataError: when none of the passages that the gate's qrels call relevant is in the index.
            IndexStateError: when the generation is not ready.
        """
        return swap(self._core, _id(generation), SwapTerms(gate, force, metric, search, note))

    def refresh(
        self,
        train_data: Any,
        eval_data: Any = None,
        *,
        output_dir: str | os.PathLike[str],
        gate: bool | Gate = True,
        force: bool = False,
        metric: str = "nDCG@10",
        search: Mapping[str, Any] | None = None,
        effort: str = "full",
        bridge: bool = False,
        isolate: bool = False,
        on_progress: OnProgress | None = None,
        **finetune_arguments: Any,
    ) -> RefreshReport:
        """Fine-tune the live encoder, build a generation with it, and swap if the gate lets it; searches go on.

        After a crash or Ctrl-C at any point the same call goes on where it was; after it is done, the same call
        returns the report again. When the gate refuses, the checkpoint and the generation stay: the same call with
        force=True swaps. `refresh.json` and `refresh.html` in the output folder tell what came of it.

        Args:
            train_data, eval_data: as for `ultrarag.finetune.finetune`; a BEIR folder about the passages of this index
                is asked of the index, other evaluation data is searched in its own corpus. train_data="feedback": the
                rows that the feedback log gives; then gate=True takes its held-out queries with votes, where no
                eval_data is given (docs/feedback.md).
            output_dir: where the checkpoint appears.
            gate: True takes the queries of `eval_data`; or (queries, qrels), searched in the index; False for none.
            force: go live although the gate says no; this is recorded.
            metric: what the gate compares.
            search: options of `evaluate` and `search` for the gate, such as {"weights": {"dense": 1, "bm25": 0.5}};
                default: the dense head alone.
            effort: what learns. "query-map" (a matrix on the query's vector), "query" (the query side) and
                "passage-map" (the query side, and a matrix on the passages' vectors) encode no passage again; "full"
                trains both sides and encodes all; "auto" climbs from the cheapest to the first that is enough, by
                the held-out queries (docs/refresh.md).
            bridge: while a full refresh encodes the passages, let the new encoder serve from the old vectors, if it is
                significantly better so on the gate's queries (docs/bridge.md).
            isolate: fine-tune in a process of its own at low priority, as `build` encodes in one: searches keep the
                interpreter and its memory. It ends with this process, however that ends. Rows and arguments are sent
                to it as JSON. Checkpoint and report are the same.
            on_progress: called about once a second with what `status()["refresh"]` says, where that is new, by a
                thread of its own.
            finetune_arguments: such as `learning_rate`; see `ultrarag.finetune.finetune`. Rows that the live model, or
                one before it, was trained on are refused without `allow_seen_data=True`.

        Raises:
            GateError: when the new generation is refused, with the numbers; the old one stays live.
            StoppedError: `cancel_refresh` was called; the same call goes on.
            UsageError: for arguments that cannot be used, or a folder with a refresh that was asked for differently.
            DataError, TrainingError, IndexStateError: as for fine-tuning, `build` and `swap`.
        """
        from ultrarag.retrieve.refresh import Refreshing, RefreshTerms, refresh

        self._core.check_writable()  # before the training
        if not self._refreshing.acquire(blocking=False):
            raise IndexStateError("a refresh is running already; wait for it to finish")
        try:
            if train_data in (FROM_FEEDBACK, [FROM_FEEDBACK]):
                train_data, gate = self._from_feedback(Path(output_dir), gate, eval_data, finetune_arguments)
            core, terms = self._core, RefreshTerms(gate, force, metric, search, effort, bridge)
            core.running = running = Refreshing(core, Path(output_dir), isolate, on_progress)
            with running.telling():
                return refresh(core, train_data, eval_data, output_dir, terms, finetune_arguments, running)
        finally:
            self._owned.running = None
            self._refreshing.release()

    def check_refresh(
        self,
        train_data: Any,
        eval_data: Any = None,
        *,
        gate: bool | Gate = True,
        metric: str = "nDCG@10",
        search: Mapping[str, Any] | None = None,
        effort: str = "full",
        bridge: bool = False,
        **finetune_arguments: Any,
    ) -> Trial:
        """Say what `refresh` with these arguments would do, and what would refuse it; nothing is trained or written.

        Args: as for `refresh`. Rows of a feedback log are taken as they are now.

        Raises:
            UsageError, DataError: for arguments and data that `refresh` cannot use at all.
        """
        from ultrarag.retrieve.refresh import RefreshTerms, check_refresh

        if train_data in (FROM_FEEDBACK, [FROM_FEEDBACK]):
            made = self.training_rows().checked()
            train_data, gate = self._judged(made.rows, made.gate, gate, eval_data, finetune_arguments)
        terms = RefreshTerms(gate, False, metric, search, effort, bridge)
        return check_refresh(self._core, train_data, eval_data, terms, finetune_arguments)

    def cancel_refresh(self) -> bool:
        """Ask the refresh that another thread runs to end: it raises StoppedError there; the same call goes on later.

        A fine-tune ends after its step, with a checkpoint; a build after the chunk that it committed last. Again: an
        isolated fine-tune ends at once.

        Returns:
            whether one was told; False where none runs, or the new generation is going live already.
        """
        running = self._core.running
        return running is not None and running.cancel()

    def rollback(self) -> Flip:
        """Bring the previous generation back, with all writes made since; rolling back again undoes it.

        While a bridge serves, its end is all that is rolled back. Passages written since that the previous generation
        cannot encode do not stop it: they are named in a warning, and listed by `status`.

        Raises:
            IndexStateError: when there is none.
            GateError: when it is not sound; nothing has changed then.
        """
        bridged = self._core.serving.generation
        if drop(self._core):
            return Flip(self._core.catalog.get(bridged.id), self._core.live.generation, None, 0.0)
        return rollback(self._core)

    def discard(self, generation: int | Generation) -> None:
        """Give up a generation that is being built or ready; `vacuum` removes its files."""
        with self._core.leading():
            found = self.generation(generation)
            if not self._core.catalog.set_state(found.id, "retired", only_from=("building", "ready")):
                now = self.generation(found.id)
                raise IndexStateError(f"generation {now.id} is {now.state}; only one not yet live can be discarded")
            if self._core.serving.generation.id == found.id:
                drop(self._core)

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


def _open_core(
    path: str | os.PathLike[str] | None,
    encoder: Encoder | None,
    uri: str | None,
    checkpoints: str | None,
    device: str | None,
    repair: bool,
    trust_remote_code: bool,
) -> Core:
    root = mirror_path(uri) if path is None and uri is not None else Path(path or "")
    if uri is not None:
        if root.exists() and any(root.iterdir()):
            check_mirror(root, uri)
        else:
            create_mirror(root, uri, checkpoints)
    core = Core.open(root, encoder, device, repair, checkpoints, trust_remote_code)
    try:
        resume(core)
    except BaseException:
        core.close()
        raise
    return core


def _close(core: Core) -> None:
    if core.running is not None:
        core.running.cancel()
    end_build(core)
    core.close()


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _id(generation: int | Generation) -> int:
    return generation.id if isinstance(generation, Generation) else generation
