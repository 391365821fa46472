"""How a live index exchanges its encoder: generations are built, searched beside the live one, swapped, rolled back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ultrarag.errors import IndexStateError, UsageError
from ultrarag.retrieve.aside import GenerationSearcher, open_searcher
from ultrarag.retrieve.bridge import BridgeTerms, drop
from ultrarag.retrieve.build import build_generation
from ultrarag.retrieve.core import Core
from ultrarag.retrieve.generation import Generation
from ultrarag.retrieve.swap import Flip, Gate, Note, SwapTerms, rollback, swap

if TYPE_CHECKING:
    from ultrarag.encode.ray import RayPool
    from ultrarag.encoder import Encoder


class Exchange:
    """What `LiveIndex` offers of its generations."""

    @property
    def _core(self) -> Core:
        raise NotImplementedError

    def generation(self, generation: int | Generation) -> Generation:
        """Return a generation as it is now."""
        return self._core.catalog.get(_id(generation))

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


def _id(generation: int | Generation) -> int:
    return generation.id if isinstance(generation, Generation) else generation
