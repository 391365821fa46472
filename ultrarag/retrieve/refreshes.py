"""The refreshes of a live index: fine-tune, build, compare and swap, in one call, one at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import IndexStateError
from ultrarag.retrieve.signals import FROM_FEEDBACK, Signals
from ultrarag.retrieve.swap import Gate

if TYPE_CHECKING:
    from ultrarag.retrieve.refresh import OnProgress, RefreshReport, Trial


class Refreshes(Signals):
    """What `LiveIndex` offers of refreshing its encoder (docs/refresh.md)."""

    #: held by the one refresh that may run
    _refreshing: threading.Lock

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

        core = self._core
        core.check_writable()  # before the training
        if not self._refreshing.acquire(blocking=False):
            raise IndexStateError("a refresh is running already; wait for it to finish")
        try:
            if train_data in (FROM_FEEDBACK, [FROM_FEEDBACK]):
                train_data, gate = self._from_feedback(Path(output_dir), gate, eval_data, finetune_arguments)
            terms = RefreshTerms(gate, force, metric, search, effort, bridge)
            core.running = running = Refreshing(core, Path(output_dir), isolate, on_progress)
            with running.telling():
                return refresh(core, train_data, eval_data, output_dir, terms, finetune_arguments, running)
        finally:
            core.running = None
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
