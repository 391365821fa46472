"""SharedEncoder: an encoder that many threads use at once, whose texts are joined into one forward at a time."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrarag.encoder.cuts import Cuts
from ultrarag.encoder.forward import BATCH_TOKENS
from ultrarag.encoder.load import dtype_of
from ultrarag.encoder.tokens import check_texts
from ultrarag.encoder.turns import Clock, Lane, Turns
from ultrarag.errors import UsageError
from ultrarag.types import Embeddings, Kind, Passage, Sparse, Tokens, text_of

if TYPE_CHECKING:
    import torch

    from ultrarag.encoder.encoder import Encoder

#: Texts of one call tokenized at a time, by the thread that calls.
WINDOW = {"cpu": 64, "cuda": 1024}


class SharedEncoder:
    """An encoder for many threads: what arrives during one forward is the next one, together.

    No text waits for others to come. Queries go before passages, which have a third of the time where both never end;
    a turn beside others is 256 tokens, or what takes 30 ms where that is more. An error of one caller's
    texts is that caller's alone.

    One thread runs the model in torch, whoever calls: each that ever ran one keeps 5 to 9 MB of buffers, and helpers of
    its own, until it ends. So Ctrl-C in a thread that waits takes nothing from the others.

    Example:
        >>> shared = SharedEncoder(encoder)
        >>> shared.encode(["what is milvus?"], "query").dense.shape  # in any thread
        (1, 384)
        >>> shared.close()
    """

    def __init__(
        self, encoder: Encoder, clock: Clock = time.monotonic, precisions: Mapping[Lane, str] | None = None
    ) -> None:
        """`precisions`: of queries or passages, where it is not the encoder's."""
        self.encoder, self._precisions = encoder, precisions or {}
        self._clock, self._owner = clock, os.getpid()
        self._turns = Turns(2 * BATCH_TOKENS.get(encoder.device.type, BATCH_TOKENS["cuda"]), clock)
        self._lines: dict[Lane, deque[_Request]] = {"query": deque(), "passage": deque()}
        self._changed = threading.Condition()
        #: whether the thread is at work, and on what
        self._running, self._held = False, ""
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ultrarag-encode")

    def __enter__(self) -> SharedEncoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more texts; those that wait are still encoded, then the thread ends."""
        with self._changed:
            self._closed = True
        self._pool.shutdown(wait=False)

    def encode(
        self,
        texts: str | Passage | Sequence[str | Passage],
        kind: Kind = "passage",
        *,
        heads: Sequence[str] | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        cuts: Cuts | None = None,
    ) -> Embeddings:
        """Return the texts' embeddings as numpy arrays, in the order given; arguments as of `Encoder.encode`.

        Raises:
            UsageError: what `Encoder.encode` refuses; the encoder was closed, or belongs to the parent of this process.
        """
        texts = [texts] if isinstance(texts, str | Passage) else list(texts)
        if not texts:
            return self.encode([""], kind, heads=heads)[:0]
        chosen = self._checked(texts, kind, heads)
        counted, length = cuts or Cuts(), self.encoder.max_length(kind, max_length)
        order = sorted(range(len(texts)), key=lambda row: len(text_of(texts[row])))  # little padding within a turn
        window, parts = WINDOW.get(self.encoder.device.type, WINDOW["cuda"]), []
        for start in range(0, len(order), window):
            some = [texts[row] for row in order[start : start + window]]
            tokens = self.encoder.tokenize(some, kind, max_length, instruction)
            counted.add(tokens.truncated, len(tokens), "texts", length)
            parts.append(self._encoded(_Request(tokens, kind, chosen)))
        if cuts is None:
            counted.tell()
        if len(texts) == 1:
            return parts[0]
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return Embeddings.cat(parts)[place]

    def _checked(self, texts: list[str | Passage], kind: Kind, heads: Sequence[str] | None) -> tuple[str, ...]:
        if os.getpid() != self._owner:
            raise UsageError(
                f"this SharedEncoder was made by process {self._owner}, whose thread its fork {os.getpid()} does not "
                f"have: make one after forking"
            )
        self.encoder.check_kind(kind)
        check_texts(texts)
        return self.encoder.checked_heads(heads)

    def _encoded(self, request: _Request) -> Embeddings:
        """Encode it, or wait for the thread to do so."""
        try:
            if not self._at_once(request):
                self._submit(request)
                request.done.wait()
        except BaseException as error:  # Ctrl-C while it waits: nobody is interested any more
            request.fail(error)
            raise
        if request.error is not None:
            raise request.error
        return request.parts[0] if len(request.parts) == 1 else Embeddings.cat(request.parts)

    def _at_once(self, request: _Request) -> bool:
        """Encode a query in the thread that asks, where nobody else is there and a compiled model does it all.

        To wake another thread and wait for it takes as long as a tenth of a query. Who comes meanwhile waits for that
        thread, as for any turn.
        """
        dtype = self._dtype(request.lane)
        if len(request.ids) != 1 or not self.encoder.gives_dense(request.kind, request.heads, dtype):
            return False
        begun = False
        try:
            with self._changed:
                if self._closed or self._running or any(self._lines.values()):
                    return False
                begun = True
                self._running, self._held = True, request.lane
                self._turns.arrive(request.lane, idle=True, alone=True)
                self._turns.begin(request.lane)
            self._take([request.slice(0, some=True)])
        finally:
            if begun:
                self._hand_over()
        return True

    def _hand_over(self) -> None:
        """Leave those that came meanwhile to the thread; where it has ended, encode them here."""
        with self._changed:
            self._held = ""
            self._running = waiting = any(self._lines.values())
            closed = self._closed
            if waiting and not closed:
                self._pool.submit(self._run)
        if waiting and closed:
            self._run()

    def _dtype(self, lane: Lane) -> torch.dtype | None:
        """What the forward of a lane computes in."""
        return dtype_of(self._precisions.get(lane, self.encoder.precision), self.encoder.device)

    def _submit(self, request: _Request) -> None:
        with self._changed:
            if self._closed:
                raise UsageError("this SharedEncoder was closed; it takes no more texts")
            here = {self._held, *(lane for lane, line in self._lines.items() if line)} - {""}
            if not self._running:
                self._pool.submit(self._run)
                self._running = True
            self._turns.arrive(request.lane, idle=request.lane not in here, alone=not here)
            self._lines[request.lane].append(request)
            self._changed.notify()

    def _run(self) -> None:
        """Give turns until nobody waits; in the thread."""
        try:
            while turn := self._next():
                self._take(turn)
        except BaseException as error:  # a fault of ours: nobody may wait for ever
            with self._changed:
                self._running, self._held = False, ""
                left = [request for line in self._lines.values() for request in line]
                for line in self._lines.values():
                    line.clear()
            for request in left:
                request.fail(error)

    def _next(self) -> list[_Slice]:
        """The texts of the next turn; none where nobody waits."""
        with self._changed:
            while True:
                for line in self._lines.values():
                    while line and line[0].done.is_set():
                        line.popleft()
                waiting = [lane for lane, line in self._lines.items() if line]
                if not waiting:
                    self._running = False
                    return []
                lane, seconds = self._turns.next(waiting)
                if lane is None:
                    self._changed.wait(seconds)
                elif turn := _gather(self._lines[lane], self._turns.tokens(lane)):
                    self._held = lane
                    return turn

    def _take(self, turn: list[_Slice]) -> None:
        began = self._clock()
        self._forward(turn)
        seconds, lane = self._clock() - began, turn[0].request.lane
        with self._changed:
            self._turns.ran(lane, seconds, sum(slice.tokens for slice in turn))
            self._held = ""  # before its callers know: what they ask for next meets nobody
        for slice in turn:
            slice.request.end()

    def _forward(self, turn: list[_Slice]) -> None:
        """Encode texts together; where that fails, each caller's apart."""
        try:
            parts = self._vectors(turn)
        except BaseException as error:
            if len(turn) == 1:
                turn[0].request.fail(error)
            else:
                for slice in turn:
                    self._forward([slice])
            return
        for slice, part in zip(turn, parts, strict=True):
            slice.request.parts.append(part)

    def _vectors(self, turn: list[_Slice]) -> list[Embeddings]:
        encoder, first = self.encoder, turn[0].request
        budget = BATCH_TOKENS.get(encoder.device.type, BATCH_TOKENS["cuda"])
        dtype = self._dtype(first.lane)
        ids = [row for slice in turn for row in slice.ids]
        found = encoder.encode_tokens(Tokens(ids, kind=first.kind), first.heads, budget, dtype)
        if len(turn) == 1:
            return [found]
        parts, start = [], 0
        for slice in turn:
            parts.append(_narrowed(found[start : start + len(slice.ids)]))
            start += len(slice.ids)
        return parts


class _Request:
    """Tokenized texts of one caller, and what has become of them."""

    def __init__(self, tokens: Tokens, kind: Kind, heads: tuple[str, ...]) -> None:
        self.ids, self.kind, self.heads = tokens.ids, kind, heads
        self.lane: Lane = "query" if kind == "query" else "passage"
        #: how many are in turns, past or present
        self.taken = 0
        self.parts: list[Embeddings] = []
        self.error: BaseException | None = None
        self.done = threading.Event()

    def fits_with(self, other: _Request) -> bool:
        """Whether both may be in one forward."""
        return (self.kind, self.heads) == (other.kind, other.heads)

    def slice(self, most: int, some: bool) -> _Slice:
        """The next texts, of so many tokens at most; one at least where there must be some."""
        start, used = self.taken, 0
        while self.taken < len(self.ids):
            length = len(self.ids[self.taken])
            if used + length > most and not (some and self.taken == start):
                break
            used += length
            self.taken += 1
        return _Slice(self, self.ids[start : self.taken], used)

    def fail(self, error: BaseException) -> None:
        """Nobody need encode the rest of it."""
        self.error = error
        self.done.set()

    def end(self) -> None:
        """Answer its caller, once all of it is there."""
        if self.taken == len(self.ids):
            self.done.set()


class _Slice:
    """Some texts of a request, in one turn."""

    def __init__(self, request: _Request, ids: list[list[int]], tokens: int) -> None:
        self.request, self.ids, self.tokens = request, ids, tokens


def _gather(line: deque[_Request], most: int) -> list[_Slice]:
    """Take the texts of one turn out of a line; a caller that has more goes to its end, behind those that came since.

    Args:
        most: tokens; one text may have more.
    """
    waiting, first = list(line), line[0]
    line.clear()
    turn: list[_Slice] = []
    begun: list[_Request] = []
    for place, request in enumerate(waiting):
        if request.done.is_set():  # it failed, or its caller left
            continue
        if not request.fits_with(first):
            line.append(request)
            continue
        slice = request.slice(most, some=not turn)
        if not slice.ids:
            line.extend(waiting[place:])
            break
        turn.append(slice)
        most -= slice.tokens
        if request.taken < len(request.ids):
            begun.append(request)
    line.extend(begun)
    return turn


def _narrowed(part: Embeddings) -> Embeddings:
    """One caller's rows of a joined batch, without the padding that the longest row of another one asked for."""
    changes: dict[str, Any] = {}
    if part.sparse is not None:
        width = _width(part.sparse.ids != Sparse.PAD_ID)
        changes["sparse"] = Sparse(part.sparse.ids[:, :width], part.sparse.weights[:, :width])
    if part.colbert is not None:
        width = _width(part.mask != 0)
        changes |= {"colbert": part.colbert[:, :width], "mask": part.mask[:, :width]}
    return Embeddings(**{**{name: getattr(part, name) for name in ("dense", "scores")}, **changes})


def _width(used: np.ndarray) -> int:
    """Columns up to the last that a row uses, one at least."""
    columns = np.flatnonzero(used.any(axis=0))
    return int(columns[-1]) + 1 if len(columns) else 1
