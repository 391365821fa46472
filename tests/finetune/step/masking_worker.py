"""One rank of the masked cross-device runs: started by test_masking.py under torchrun, writes JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ultrarag.encoder import Encoder
from ultrarag.finetune.batches.loader import Collator
from ultrarag.finetune.batches.plan import Batch
from ultrarag.finetune.flags.groups import DataArguments, FalseNegativeArguments
from ultrarag.finetune.step.distributed import gather, rank
from ultrarag.finetune.step.gradcache import by_texts, cached_step
from ultrarag.finetune.step.masking import FalseNegatives, Guide
from ultrarag.finetune.step.trainable import Trainable
from ultrarag.hookspecs import LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.plugins import registry
from ultrarag.types import Embeddings

#: rows 0 and 2 have one query; row 1's second positive is row 3's negative; row 0's negative is row 2's positive
BATCH = Batch(
    queries=["why does bread rise", "seals", "Why does  bread rise", "oil"],
    passages=["a hot oven", "Steam", "under water", "bread bread", "steam", "crust", "once", "Seals  SLEEP"],
    teacher=None,
    group_size=2,
    in_batch_negatives=True,
    dataset="x",
    sources=["x:1", "x:2", "x:3", "x:4"],
    prompts=[None] * 4,
    positives=[("a hot oven",), ("under water", "seals sleep"), ("steam",), ("once",)],
)
SHORT = DataArguments([{}], query_max_len=16, passage_max_len=16)
MASKS = ("text", "margin", "guide")


def part(batch: Batch, number: int) -> Batch:
    """Half of the rows: those of one of two ranks."""
    rows, texts = slice(number * 2, number * 2 + 2), slice(number * 4, number * 4 + 4)
    return Batch(
        **{
            **batch.__dict__,
            **{name: getattr(batch, name)[rows] for name in ("queries", "sources", "prompts", "positives")},
            "passages": batch.passages[texts],
        }
    )


def make(path: str, mask: str, batch: Batch = BATCH) -> tuple[Trainable, list[Any], FalseNegatives]:
    """The model in float64, the tokenized batch, and what masks it; every head."""
    torch.manual_seed(0)
    adapter = registry().adapter("bgem3")
    model = adapter.load(path, LoadOptions(training=True)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoder = Encoder(adapter, model, model.settings, device="cpu")
    settings = {"false_negative_margin": 0.001} if mask != "text" else {}
    if mask == "guide":
        guide = Guide.load(path, "bgem3", SHORT, torch.device("cpu"), 3)
        guide.encoder.model.double()
        masking = FalseNegatives(FalseNegativeArguments(mask, guide_model=path, **settings), guide)
    else:
        masking = FalseNegatives(FalseNegativeArguments(mask, **settings))
    sides = Collator.of(encoder, SHORT)([batch])
    return Trainable(encoder, encoder.heads).train(), [sides["queries"], sides["passages"]], masking


def arguments_of(batch: Batch, mask: Tensor | None = None) -> LossArguments:
    return LossArguments(temperature=0.1, use_self_distill=True, group_size=batch.group_size, false_negatives=mask)


def embeddings(module: Any, sides: list[Any]) -> list[Embeddings]:
    found: list[Embeddings] = module(sides)
    return found


def loss_of(module: Trainable, masking: FalseNegatives, batch: Batch, across: bool) -> Callable[..., Tensor]:
    """The loss as the trainer takes it."""
    features = masking.features(batch)

    def loss(sides: list[Embeddings]) -> Tensor:
        query, passage = sides
        passage = gather(passage) if across else passage
        mask = masking(features, query, passage, batch.group_size, False, across)
        return module.adapter.loss(module.model, query, passage, None, 5, arguments_of(batch, mask))

    return loss


def norms(module: Trainable, loss: Tensor) -> dict[str, float]:
    gradient = {name: p.grad.norm().item() for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), **{name: value for name, value in gradient.items() if value > 1e-9}}


def on_two(path: str, mask: str, chunk: int | None) -> dict[str, float]:
    """DDP over the two halves of the batch."""
    mine = part(BATCH, rank())
    module, sides, masking = make(path, mask, mine)
    wrapped = DistributedDataParallel(module, find_unused_parameters=True)
    loss = loss_of(module, masking, mine, across=True)
    if chunk:
        value = cached_step(sides, wrapped, loss, lambda value: value.backward(), by_texts(chunk), wrapped.no_sync)
    else:
        value = loss(wrapped(sides))
        value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return norms(module, mean / 2)


def on_one(path: str, mask: str, masked: bool) -> dict[str, float]:
    """The whole batch in this process alone."""
    module, sides, masking = make(path, mask)
    loss = loss_of(module, masking, BATCH, across=False)
    value = (
        loss(module(sides))
        if masked
        else module.adapter.loss(module.model, *module(sides), None, 5, arguments_of(BATCH))
    )
    value.backward()
    return norms(module, value.detach())


def main() -> None:
    path, target = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {mask: {"two": on_two(path, mask, None), "chunks": on_two(path, mask, 3)} for mask in MASKS}
    if rank() == 0:
        for mask in MASKS:
            found[mask] |= {"one": on_one(path, mask, True), "unmasked": on_one(path, mask, False)}
        Path(target).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
