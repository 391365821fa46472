"""The points of `scaling.py`: each measures one thing at one size, in the process that it is called in."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from encode import mixed_lengths, read_corpus

STARTED = time.perf_counter()
#: Tokens of a query where the passage's length is what changes, and of both where it is not.
QUERY, PASSAGE = 16, 64


def encode_length(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Texts of one length, always the same number of tokens, in forwards of the encoder's own size."""
    return encode_tokens([length] * max(1, options.tokens // length), None, options)


def encode_batch(budget: int, options: argparse.Namespace) -> dict[str, Any]:
    """Texts of mixed lengths, in forwards of so many tokens."""
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(np.log(40), 0.9, 1 + options.tokens // 40).clip(3, 128)
    return encode_tokens(drawn.astype(int).tolist(), budget, options)


def encode_tokens(lengths: list[int], budget: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Encode texts of these lengths, given as token ids, after some of them have warmed up."""
    import torch

    from ultrarag.encoder import BATCH_TOKENS
    from ultrarag.types import Tokens

    encoder = load(options)
    budget = budget or BATCH_TOKENS[torch.device(options.device).type]
    tokens = Tokens([made_up(1, length, encoder)["input_ids"][0].tolist() for length in lengths])
    some = Tokens(tokens.ids[: max(2, len(lengths) // 8)])
    encoder.encode_tokens(some, ("dense",), budget)
    with measured(options) as found:
        encoder.encode_tokens(tokens, ("dense",), budget)
    return {**found, "items": sum(lengths), **size_of(encoder.model)}


def encode_corpus(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """A whole run over a corpus that is read and let go chunk by chunk, from the start of the process."""
    texts = mixed_lengths(read_corpus(None), count)
    with measured(options, whole=True) as found:
        encoder = load(options)
        for _ in encoder.iter_encode(texts):
            pass
    return {**found, "items": count}


def train_length(length: int, options: argparse.Namespace, attention_dropout: bool = True) -> dict[str, Any]:
    """Steps with passages of one length, always about the same number of tokens.

    Args:
        attention_dropout: of attention's weights, which keeps torch from its fused attention on a CPU.
    """
    return train(max(2, options.tokens // 8 // (length + QUERY)), length, options, attention_dropout)


def train_batch(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Steps with so many queries, one passage each."""
    return train(batch, PASSAGE, options)


def train(batch: int, length: int, options: argparse.Namespace, attention_dropout: bool = True) -> dict[str, Any]:
    """Steps (forward, in-batch loss, backward, AdamW) on made-up token ids, after one that warms up."""
    import torch

    from ultrarag.finetune.step.trainable import Trainable
    from ultrarag.loss_arguments import LossArguments

    encoder = load(options)
    if not attention_dropout:
        for part in encoder.model.modules():
            if type(part).__name__ == "BertSelfAttention":
                part.dropout.p = 0.0
    module = Trainable(encoder, ("dense",)).train()
    arguments = LossArguments(temperature=0.05, group_size=1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        sides = [made_up(batch, tokens, encoder, options.device) for tokens in (QUERY, length)]
        loss = encoder.adapter.loss(encoder.model, *module(sides), None, 0, arguments)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the GPU

    step()
    with measured(options) as found:
        for _ in range(options.steps):
            step()
    return {**found, "items": options.steps * batch * (QUERY + length), **size_of(encoder.model)}


def train_rows(rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """A whole fine-tuning run with few steps: what more rows cost is reading, checking and tokenising them."""
    from ultrarag.finetune import finetune

    texts = mixed_lengths(read_corpus(None), 2 * rows)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "train.jsonl"
        pairs = zip(texts[:rows], texts[rows:], strict=True)
        lines = [json.dumps({"query": f"{n} {a}", "pos": [f"{n} {b}"]}) for n, (a, b) in enumerate(pairs)]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with measured(options, whole=True) as found:
            finetune(
                options.model,
                str(data),
                str(Path(place) / "output"),
                adapter="bge",
                train_group_size=1,
                query_max_len=QUERY,
                passage_max_len=PASSAGE,
                per_device_train_batch_size=4,
                max_steps=options.steps,
                save_strategy="no",
                cache_path=str(Path(place) / "cache"),
                use_cpu=options.device == "cpu",
            )
    return {**found, "items": rows}


@contextmanager
def measured(options: argparse.Namespace, whole: bool = False) -> Iterator[dict[str, Any]]:
    """Fill in wall and processor seconds of the block, or of the process so far (`whole`), and the peak memory."""
    import torch

    from ultrarag.finetune.step.callbacks import peak_memory

    wall, processor = (STARTED, 0.0) if whole else (time.perf_counter(), time.process_time())
    found: dict[str, Any] = {}
    yield found
    found["wall"], found["processor"] = time.perf_counter() - wall, time.process_time() - processor
    found["peak_mib"] = peak_memory(torch.device(options.device)) / 2**20


def load(options: argparse.Namespace) -> Any:
    """The encoder."""
    from ultrarag import Encoder

    return Encoder.load(options.model, adapter="bge", device=options.device)


def made_up(count: int, length: int, encoder: Any, device: str = "cpu") -> dict[str, Any]:
    """Token ids at random, without padding."""
    import torch

    known = len(encoder.tokenizer)
    ids = torch.randint(min(1000, known // 2), known, (count, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def size_of(model: Any) -> dict[str, int]:
    """What decides how much of the arithmetic is attention: the linear layers' weights, and layers times width."""
    from torch import nn

    weights = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    return {"weights": weights, "attention": model.config.num_hidden_layers * model.config.hidden_size}


POINTS: dict[str, Callable[[int, argparse.Namespace], dict[str, Any]]] = {
    "encode_length": encode_length,
    "encode_batch": encode_batch,
    "encode_corpus": encode_corpus,
    "train_length": train_length,
    "train_length_plain": partial(train_length, attention_dropout=False),
    "train_batch": train_batch,
    "train_rows": train_rows,
}
