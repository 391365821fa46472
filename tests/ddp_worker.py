"""One rank of the golden cross-device runs: started by test_golden_ddp.py under torchrun, writes JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests import golden
from ultrarag.encoder import Encoder
from ultrarag.finetune.step.distributed import gather, rank
from ultrarag.finetune.step.gradcache import by_texts, cached_step
from ultrarag.finetune.step.trainable import Trainable, freeze
from ultrarag.hookspecs import LoadOptions
from ultrarag.loss_arguments import LossArguments
from ultrarag.plugins import registry
from ultrarag.types import Embeddings


def features(batch: str, of_rank: int, side: str) -> dict[str, torch.Tensor]:
    found = golden.arrays(golden.VISIBLE_SET.data / "ddp_inputs.npz")
    names = ("input_ids", "attention_mask")
    return {name: torch.tensor(found[f"batch/{batch}/r{of_rank}/{side}/{name}"]).long() for name in names}


def teacher(batch: str, of_rank: int, group: int) -> torch.Tensor:
    values = golden.read(golden.VISIBLE_SET.data / "ddp.json")["batches"][f"{batch}/r{of_rank}"]
    return torch.tensor(values["teacher_scores"], dtype=torch.float64).view(-1, group)


def trainable(config: dict) -> Trainable:
    heads = ("dense", "sparse", "colbert") if config["unified"] else ("dense",)
    adapter = registry().adapter("bgem3")
    options = LoadOptions(normalize=config["normalize"], training=True)
    model = adapter.load(str(golden.VISIBLE_SET.model), options).double()
    encoder = Encoder(adapter, model, model.settings, device="cpu")
    freeze(encoder, heads, fix_encoder=False, fix_positions=False)
    return Trainable(encoder, heads)


def arguments(config: dict, group: int) -> LossArguments:
    return LossArguments(
        temperature=config["temperature"],
        kd_loss_type=config["kd_loss_type"],
        use_self_distill=config["self_distill"],
        use_mrl=bool(config["mrl_dims"]),
        mrl_dims=tuple(config["mrl_dims"]),
        normalize_embeddings=config["normalize"],
        group_size=group,
    )


def norms(module: Trainable) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, parameter in module.model.named_parameters():
        if parameter.grad is not None:
            group = name.split(".")[0] if name.split(".")[0].endswith("_linear") else "encoder"
            sums[group] = sums.get(group, 0.0) + parameter.grad.pow(2).sum().item()
    return {name: value**0.5 for name, value in sums.items()}


def two_ranks(case: dict, chunk: int | None) -> tuple[float, dict[str, float]]:
    """DDP over the two ranks' batches, as the trainer does it."""
    config, batch = case["config"], case["batch"]
    module = trainable(config)
    wrapped = DistributedDataParallel(module.train())
    sides = [features(batch, rank(), "q"), features(batch, rank(), "p")]
    group = sides[1]["input_ids"].shape[0] // sides[0]["input_ids"].shape[0]
    target = teacher(batch, rank(), group) if config["teacher"] else None

    def loss(embeddings: list[Embeddings]) -> torch.Tensor:
        query, passage = embeddings
        passage = gather(passage) if config["cross"] else passage
        return module.adapter.loss(module.model, query, passage, target, 0, arguments(config, group))

    if chunk:
        value = cached_step(sides, wrapped, loss, lambda value: value.backward(), by_texts(chunk), wrapped.no_sync)
    else:
        value = loss(wrapped(sides))
        value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / 2, norms(module)


def one_process(case: dict) -> tuple[float, dict[str, float]]:
    """The whole batch in one process: the mean of the two ranks' losses, every representation alive."""
    config, batch = case["config"], case["batch"]
    module = trainable(config).train()
    ranks = [module([features(batch, r, "q"), features(batch, r, "p")]) for r in range(2)]
    group = len(ranks[0][1]) // len(ranks[0][0])
    total = 0
    for r in range(2):
        passage = Embeddings.cat([ranks[r][1], ranks[1 - r][1]]) if config["cross"] else ranks[r][1]
        target = teacher(batch, r, group) if config["teacher"] else None
        loss = module.adapter.loss(module.model, ranks[r][0], passage, target, 0, arguments(config, group))
        total = total + loss / 2
    total.backward()
    return total.item(), norms(module)


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for case in golden.read(golden.VISIBLE_SET.data / "ddp.json")["cases"]:
        plain, cached = two_ranks(case, None), two_ranks(case, 2)
        whole = one_process(case) if rank() == 0 else None
        results[case["name"]] = {"two_ranks": plain, "gradcache": cached, "one_process": whole}
    if rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
