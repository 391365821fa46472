"""The device: its fastest precision, casts, and work begun ahead before the last result is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import nn

from ultrarag.encoder.engines import Snapshot
from ultrarag.packing import ORIGINAL
from ultrarag.products import OneDnnLinear

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


#: Just below 32 MiB, the largest block that glibc keeps.
_KEPT = (32 << 20) - (64 << 10)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep freed blocks of up to 32 MiB for the next layer, once a process.

    glibc gives the pages of large blocks back as they are freed, and the kernel fills them with zeros when the next
    layer asks for them (benchmarks/page_faults.py). How large a block it keeps follows the largest mapped one that was
    ever freed (mallopt(3)), so one is freed here, whose pages were never touched: that takes no memory. Limits that
    the environment sets, and other allocators, stay as they are.
    """
    torch.empty(_KEPT, dtype=torch.uint8, device="cpu")


def one_ahead(
    start: Callable[[_Item], Callable[[], _Result]], items: Iterable[_Item]
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order, after the next one was started.

    Args:
        start: begins an item, and returns what waits for its result.
    """
    waiting: tuple[_Item, Callable[[], _Result]] | None = None
    for item in items:
        started = (item, start(item))
        if waiting:
            yield waiting[0], waiting[1]()
        waiting = started
    if waiting:
        yield waiting[0], waiting[1]()


def in_background(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yield the function's results; the next one is made in a thread while one is used.

    Items are drawn in the calling thread: they may come from a database or another thing that belongs to it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ultrarag-ahead") as pool:
        for _, result in one_ahead(lambda item: pool.submit(function, item).result, items):
            yield result


#: Forwards at a time: with more, the interpreter lock becomes the limit.
MOST = 4


def side_by_side() -> int:
    """How many forwards to run at a time with the threads that torch has."""
    return max(1, min(MOST, torch.get_num_threads()))


def map_side_by_side(
    function: Callable[[_Item], _Result], items: Sequence[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """Yield each item with its result, in order; each worker has its share of torch's threads."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from ((item, function(item)) for item in items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ultrarag-forward")
    try:
        _divide(pool, workers, threads)
        futures = [pool.submit(function, item) for item in items]
        for item, future in zip(items, futures, strict=True):
            yield item, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _divide(pool: ThreadPoolExecutor, workers: int, threads: int) -> None:
    """Give each worker its share of the threads, and this thread (and threads to come) what it had.

    `set_num_threads` sets the calling thread's number, and the one that every other thread takes over when it first
    uses torch; so a worker takes it over first.
    """
    all_there = threading.Barrier(workers)

    def settle() -> None:
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        all_there.wait()

    for future in [pool.submit(settle) for _ in range(workers)]:
        future.result()
    torch.set_num_threads(threads)


class Casts:
    """Twins of a model by dtype: all is shared with the model but the matrices of its transformers backbone."""

    def __init__(self, stopped: bool = False) -> None:
        self._lock = threading.Lock()
        self._twins: dict[torch.dtype, _Twin] = {}
        self._stopped = stopped

    def __reduce__(self) -> tuple[type[Casts], tuple[bool]]:
        """A copy of an encoder makes its own."""
        return Casts, (self._stopped,)

    def of(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """What to call under autocast to `dtype`; the model itself where a twin could differ from it.

        A twin is made at first use, and anew once a weight or a module is not the one that it was made from.
        """
        with self._lock:
            if self._stopped:
                return model
            twin = self._twins.get(dtype)
            if twin is None or not twin.up_to_date(model):
                twin = self._twins[dtype] = _Twin(model, dtype)
            return twin.model

    def stop(self) -> None:
        """The weights change from now on (training): hold no twin, and make none any more."""
        with self._lock:
            self._stopped = True
            self._twins.clear()


class _Twin:
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._made_of = Snapshot(model)
        whole = not any(_runs_something_else(module) for module in model.modules())
        cast = set(_castable(model)) if whole else set()
        self.model = _copied(model, cast, dtype, {}) if cast else model

    def up_to_date(self, model: nn.Module) -> bool:
        """Whether it was made from this model, with the modules and weights that it has now."""
        return self._made_of.up_to_date(model)


def _runs_something_else(module: nn.Module) -> bool:
    """Whether calling the module does not (only) run its `forward`: it is compiled, or weights are moved for it."""
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_hf_hook")


def _castable(model: nn.Module) -> Iterator[nn.Module]:
    """The plain linear layers of stock transformers models: other code may do more with a weight than multiply."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel) and type(part).__module__.startswith("transformers."):
            for layer in part.modules():
                plain = type(layer) in (nn.Linear, OneDnnLinear) and type(layer.weight) is nn.Parameter
                if plain and layer.weight.dtype is torch.float32 and not layer.weight.is_meta:
                    yield layer


def _copied(module: nn.Module, cast: set[nn.Module], dtype: torch.dtype, known: dict[int, nn.Module]) -> nn.Module:
    """The module with children of its own; parameters, buffers and everything else are the original's."""
    if (found := known.get(id(module))) is not None:
        return found
    twin = module.__new__(type(module))
    known[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    twin.__dict__[ORIGINAL] = module
    twin._buffers = dict(module._buffers)
    twin._parameters = dict(module._parameters)
    if module in cast:
        for name, weight in module._parameters.items():
            if weight is not None:
                twin._parameters[name] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    twin._modules = {
        name: None if child is None else _copied(child, cast, dtype, known) for name, child in module._modules.items()
    }
    return twin
