"""A contender of `gpu.py`: one library, in a process of its own and in whatever Python has it.

`gpu.py` starts it with the library's name and a plan (a JSON file); it says what it runs on, and then, task by task,
how long each took and how much memory. It imports nothing of ours unless it is ours that is measured.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: The package of each, by the name that reports use.
PACKAGES = {
    "ultrarag": "ultrarag",
    "FlagEmbedding": "FlagEmbedding",
    "sentence-transformers": "sentence_transformers",
}
#: Ids of the made-up tokenizer: <s> <pad> </s> <unk> come first, <mask> last, and the word "w17" is id 17.
BEGIN, PAD, END, SPECIAL = 0, 1, 2, 4
#: Of contenders that are called otherwise than what pip installs.
DISTRIBUTIONS = {"ultrarag": "ultrarag-retrieval"}
TEMPERATURE = 0.02
#: Vectors that are handed over, to see that all contenders did the same work.
SHOWN = 8


def main() -> None:
    """Run the tasks of the plan that this library can do."""
    name, plan = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    import torch

    torch.manual_seed(0)
    say(
        {
            "device": device_name(plan["device"]),
            "versions": {n: version(DISTRIBUTIONS.get(n, n)) for n in ("torch", "transformers", name)},
        }
    )
    for task in plan["tasks"]:
        if name in task["contenders"]:
            say({"task": task["name"], **attempt(name, task, plan)})


def attempt(name: str, task: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The task's result, or in words why there is none; nothing of it stays in memory."""
    import torch

    run = encode if task["kind"] == "encode" else train
    try:
        with memory(plan["device"]) as peak:
            found = run(name, task, plan)
        return {**found, "peak_gib": peak()}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # one library's failure is a result of the comparison, and not the end of it
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gc.collect()
        if plan["device"] != "cpu":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def memory(device: str) -> Iterator[Callable[[], float]]:
    """Give a function that says the most GiB in use so far: torch's on the GPU, the process's on a CPU."""
    import torch

    if device == "cpu":
        yield lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return
    torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 2**30


def encode(name: str, task: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Seconds of encoding the task's texts (dense vectors), after a part of them has warmed up."""
    texts = made_up_texts(task["lengths"], plan["vocabulary"])
    run = ENCODERS[name](plan)
    run(texts[: max(2, len(texts) // 16)])
    seconds, vectors = timed(lambda: run(texts), plan["device"])
    return {"seconds": seconds, "vectors": [[round(float(x), 6) for x in row] for row in vectors[:SHOWN]]}


def train(name: str, task: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the task's steps (forward, loss, backward, AdamW), after its first ones have warmed up."""
    import torch

    device, cut = plan["device"], plan["warm_up"]
    module, loss_of = TRAINERS[name](plan, task["unified"], task["group"])
    module = module.to(device).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5, fused=True)
    sides = [batch(lengths, plan["vocabulary"], seed) for seed, lengths in enumerate(task["steps"])]
    losses = []

    def steps(chosen: list[Any]) -> None:
        for step in chosen:
            moved = [{key: value.to(device, non_blocking=True) for key, value in side.items()} for side in step]
            with precision(plan):
                loss = loss_of(moved)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

    steps(sides[:cut])
    seconds, _ = timed(lambda: steps(sides[cut:]), device)
    return {"seconds": seconds, "first_loss": float(losses[0]), "last_loss": float(losses[-1])}


def precision(plan: dict[str, Any]) -> Any:
    """Autocast, as transformers' Trainer does it for all three."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan["precision"])
    device = plan["device"].split(":")[0]
    return torch.autocast(device, dtype) if dtype else contextlib.nullcontext()


def timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Wall seconds, the GPU's work included, and the result."""
    import torch

    settle = torch.cuda.synchronize if device != "cpu" else lambda: None
    settle()
    started = time.perf_counter()
    found = run()
    settle()
    return time.perf_counter() - started, found


def our_encoder(plan: dict[str, Any]) -> Callable[[list[str]], Any]:
    """ultrarag's `encode`."""
    from ultrarag import Encoder

    encoder = Encoder.load(plan["model"], adapter="bgem3", device=plan["device"], precision=plan["precision"])
    options = {"heads": ("dense",), "batch_tokens": plan["batch_tokens"], "progress": False}
    return lambda texts: encoder.encode(texts, **options).dense


def flag_encoder(plan: dict[str, Any]) -> Callable[[list[str]], Any]:
    """FlagEmbedding's `encode`."""
    from FlagEmbedding import BGEM3FlagModel

    half = {"use_fp16": plan["precision"] == "fp16", "use_bf16": plan["precision"] == "bf16"}
    model = BGEM3FlagModel(plan["model"], devices=plan["device"], **half)
    return lambda texts: model.encode(texts, batch_size=plan["batch"], max_length=plan["longest"])["dense_vecs"]


def sentence_encoder(plan: dict[str, Any]) -> Callable[[list[str]], Any]:
    """sentence-transformers' `encode`."""
    import torch
    from sentence_transformers import SentenceTransformer

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(plan["precision"], torch.float32)
    model = SentenceTransformer(plan["model"], device=plan["device"], model_kwargs={"dtype": dtype})
    model.max_seq_length = plan["longest"]
    options = {"batch_size": plan["batch"], "normalize_embeddings": True, "show_progress_bar": False}
    return lambda texts: model.encode(texts, **options)


def our_trainer(plan: dict[str, Any], unified: bool, group: int) -> tuple[Any, Callable[[Any], Any]]:
    """The module, and a function from a batch to its loss."""
    from ultrarag import Encoder
    from ultrarag.finetune.step.trainable import Trainable
    from ultrarag.loss_arguments import LossArguments

    encoder = Encoder.load(plan["model"], adapter="bgem3", device="cpu")
    module = Trainable(encoder, ("dense", "sparse", "colbert") if unified else ("dense",))
    arguments = LossArguments(
        temperature=TEMPERATURE, group_size=group, use_self_distill=unified, self_distill_start_step=0
    )
    number = itertools.count()  # the peer counts its forwards too: self-distillation begins with the second
    return module, lambda sides: encoder.adapter.loss(encoder.model, *module(sides), None, next(number), arguments)


def flag_trainer(plan: dict[str, Any], unified: bool, group: int) -> tuple[Any, Callable[[Any], Any]]:
    """The same of FlagEmbedding; it reads the group's size off the batch."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import EncoderOnlyEmbedderM3Model, EncoderOnlyEmbedderM3Runner
    from transformers import PreTrainedTokenizerFast

    module = EncoderOnlyEmbedderM3Model(
        EncoderOnlyEmbedderM3Runner.get_model(plan["model"]),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(plan["model"]),
        temperature=TEMPERATURE,
        sentence_pooling_method="cls",
        normalize_embeddings=True,
        unified_finetuning=unified,
        use_self_distill=unified,
        self_distill_start_step=0,
    )
    return module, lambda sides: module(*sides).loss


def sentence_trainer(plan: dict[str, Any], unified: bool, group: int) -> tuple[Any, Callable[[Any], Any]]:
    """sentence-transformers' in-batch loss; every passage of the group is a column of its own there."""
    from sentence_transformers import SentenceTransformer

    try:
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    except ImportError:  # before version 6
        from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(plan["model"], device="cpu")
    criterion = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)

    def loss(sides: Any) -> Any:
        query, passage = sides
        columns = [{name: value[place::group] for name, value in passage.items()} for place in range(group)]
        return criterion([query, *columns], None)

    return model, loss


ENCODERS = {"ultrarag": our_encoder, "FlagEmbedding": flag_encoder, "sentence-transformers": sentence_encoder}
TRAINERS = {"ultrarag": our_trainer, "FlagEmbedding": flag_trainer, "sentence-transformers": sentence_trainer}


def made_up_texts(lengths: list[int], vocabulary: int) -> list[str]:
    """Texts of so many tokens each, the two special ones included."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [" ".join(f"w{id}" for id in words(rng, length - 2, vocabulary)) for length in lengths]


def words(rng: Any, count: int, vocabulary: int) -> Any:
    """Ids of words at random; as in text, some are frequent."""
    return SPECIAL + (rng.random(count) ** 4 * (vocabulary - SPECIAL - 1)).astype(int)


def batch(lengths: dict[str, list[int]], vocabulary: int, seed: int) -> list[dict[str, Any]]:
    """Queries and passages of a step, each padded to its longest."""
    import numpy as np
    import torch

    rng, sides = np.random.default_rng(seed), []
    for side in (lengths["query"], lengths["passage"]):
        ids = np.full((len(side), max(side)), PAD, dtype=np.int64)
        for row, length in zip(ids, side, strict=True):
            row[:length] = [BEGIN, *words(rng, length - 2, vocabulary), END]
        mask = np.arange(max(side)) < np.array(side)[:, None]
        sides.append({"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))})
    return sides


def device_name(device: str) -> str:
    """What the device calls itself."""
    import torch

    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def say(answer: Any) -> None:
    """Answer the parent; libraries print to stdout too."""
    print("=> " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
