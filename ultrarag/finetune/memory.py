"""`--per_device_train_batch_size auto` and `--sub_batch_size auto`: as many texts as the memory holds, tried out.

A step of the longest texts that the run allows is taken with one query and with two; what the second adds is a
query's share. On a GPU it is the allocator's peak; on a CPU, where nothing says how much was in use, what autograd
keeps for backward. The probe changes neither weights nor the random numbers of the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ultrarag.checkpoint import read_manifest
from ultrarag.encoder import Encoder
from ultrarag.errors import TrainingError, UsageError
from ultrarag.finetune.batches import PairLengths
from ultrarag.finetune.flags import AUTO
from ultrarag.finetune.step import Trainable, least, world_size
from ultrarag.hookspecs import Features

if TYPE_CHECKING:
    from ultrarag.finetune.flags import FinetuneArguments
    from ultrarag.types import Embeddings, Kind

#: The share of the free memory that a step may take.
USED = 0.8
#: On a CPU, what backward needs beside what autograd keeps: gradients of the layer at hand, and the allocator's waste.
BESIDE = 1.5
#: Bytes per trained parameter that come with the first step: its gradient and AdamW's two moments.
PER_PARAMETER = 12
#: More texts than this bring no speed.
MOST = 4096


@dataclass(frozen=True)
class Room:
    """What a step takes, in bytes."""

    #: that a step may take, the optimizer's share taken off
    free: int
    #: of a step with no text
    fixed: int
    #: of each query with its passages, or of each text
    each: int

    def fits(self) -> int:
        """How many fit; TrainingError when not even one does."""
        found = (self.free - self.fixed) // max(1, self.each)
        if found < 1:
            raise TrainingError(
                f"not even one text fits into memory: {self.each / 2**20:.0f} MiB for each and "
                f"{self.fixed / 2**20:.0f} MiB for all, of {max(0, self.free) / 2**20:.0f} MiB that are free; lower "
                "--passage_max_len, or give --gradient_checkpointing or --bf16"
            )
        return int(found)


def choose_sizes(
    arguments: FinetuneArguments,
    encoder: Encoder,
    heads: tuple[str, ...],
    rows: int,
    resume: Path | None,
    note: Callable[[str], None],
) -> None:
    """Put numbers where `auto` stands: those of the run that is resumed, else what fits on every device."""
    if not arguments.auto_batch_size and arguments.model.sub_batch_size != AUTO:
        return
    if resume is not None:
        _take_over(arguments, resume, note)
        return
    if arguments.auto_batch_size:
        room = least(measure_room(arguments, encoder, heads, whole=True))
        batch = 1 << (min(room, MOST, max(1, rows // world_size())).bit_length() - 1)
        arguments.training.per_device_train_batch_size = batch
        note(f"per_device_train_batch_size auto: {batch} queries (memory holds {room} of the longest)")
    if arguments.model.sub_batch_size == AUTO:
        room = least(measure_room(arguments, encoder, heads, whole=False))
        texts = arguments.training.per_device_train_batch_size * arguments.data.train_group_size
        arguments.model.sub_batch_size = None if room >= 2 * texts else min(room, texts, MOST)
        chosen = arguments.model.sub_batch_size or "none: the whole batch fits"
        note(f"sub_batch_size auto: {chosen} (memory holds {room} of the longest texts)")


def _take_over(arguments: FinetuneArguments, resume: Path, note: Callable[[str], None]) -> None:
    manifest = read_manifest(resume)
    if manifest is None or manifest.training is None:
        raise UsageError(f"{resume} holds no record of its run (ultrarag.json), so it cannot be resumed")
    then: dict[str, Any] = manifest.training.arguments
    if arguments.auto_batch_size:
        arguments.training.per_device_train_batch_size = int(then["training"]["per_device_train_batch_size"])
        note(f"per_device_train_batch_size auto: {arguments.training.per_device_train_batch_size}, as before")
    if arguments.model.sub_batch_size == AUTO:
        size = then["model"]["sub_batch_size"]
        arguments.model.sub_batch_size = None if size in (None, AUTO) else int(size)
        note(f"sub_batch_size auto: {arguments.model.sub_batch_size}, as before")


def measure_room(arguments: FinetuneArguments, encoder: Encoder, heads: tuple[str, ...], whole: bool) -> int:
    """How many queries with their passages (`whole`), or single texts, a step's memory holds."""
    device = torch.device(arguments.training.device)
    module = Trainable(encoder, heads).train()
    group = arguments.data.train_group_size if whole else 1
    one, two = (_step(arguments, encoder, module, count, group, whole, device) for count in (1, 2))
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    each = max(1, two - one)
    return Room(int(USED * free_memory(device)) - PER_PARAMETER * trained, max(0, one - each), each).fits()


def _step(
    arguments: FinetuneArguments,
    encoder: Encoder,
    module: Trainable,
    count: int,
    group: int,
    whole: bool,
    device: torch.device,
) -> int:
    """The bytes that a forward and backward of made-up texts takes."""
    sides = _sides(arguments, encoder, count, group, whole, device)
    with _unchanged(module, device), _counted(device) as taken:
        with _precision(arguments, device):
            embeddings: list[Embeddings] = module(sides)
            total = sum((array.float().sum() for side in embeddings for array in side.arrays() if _grows(array)), 0.0)
        cast(Tensor, total).backward()
    return taken()


def _grows(array: Tensor) -> bool:
    return array.is_floating_point() and array.requires_grad


def _sides(
    arguments: FinetuneArguments, encoder: Encoder, count: int, group: int, whole: bool, device: torch.device
) -> list[Features]:
    """Texts as long as the run allows: queries and passages, pairs, or passages alone."""
    data = arguments.data
    if encoder.adapter.declared.pair_input:
        return [_texts(encoder, count * group, PairLengths.of(data).pair, device)]
    query, passage = (encoder.max_length(kind, asked) for kind, asked in _lengths(arguments))
    passages = _texts(encoder, count * group, passage or data.passage_max_len, device, "passage")
    return [_texts(encoder, count, query or data.query_max_len, device, "query"), passages] if whole else [passages]


def _lengths(arguments: FinetuneArguments) -> Iterator[tuple[Kind, int]]:
    yield "query", arguments.data.query_max_len
    yield "passage", arguments.data.passage_max_len


def _texts(encoder: Encoder, count: int, length: int, device: torch.device, kind: Kind | None = None) -> Features:
    """Token ids that are all different within a text, so that nothing is saved on them."""
    known = len(encoder.reader(kind).tokenizer)
    ids = (torch.arange(length) % max(1, known - 10) + min(10, known - 1)).expand(count, -1).contiguous()
    found: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    if kind:
        found["kind"] = kind
    return cast(Features, found)


def _precision(arguments: FinetuneArguments, device: torch.device) -> Any:
    training = arguments.training
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@contextmanager
def _unchanged(module: Trainable, device: torch.device) -> Iterator[None]:
    """Move the model to the device for the probe; leave no gradient, and the random numbers as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        module.to(device)
        try:
            yield
        finally:
            module.zero_grad(set_to_none=True)


@contextmanager
def _counted(device: torch.device) -> Iterator[Callable[[], int]]:
    """Count what the block takes: the allocator's peak, or on a CPU what autograd keeps."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: int(BESIDE * sum(kept.values()))


def free_memory(device: torch.device) -> int:
    """Bytes that are free: on the GPU, or for this process on the machine and in its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _read_number(path: Path) -> int | None:
    """The number in a file of the kernel's; None where there is none, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
