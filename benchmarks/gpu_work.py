"""What the contenders of `gpu.py` work on: a model of bge-m3's size with random weights, and a plan of tasks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from gpu_contenders import PACKAGES

LIBRARIES = tuple(PACKAGES)
#: bge-m3's sizes, and those of --tiny, where the contenders' losses are the same, as nothing is random
FULL = {
    "layers": 24,
    "width": 1024,
    "vocabulary": 250002,
    "longest": 512,
    "mean": 180,
    "query": (20, 64),
    "dropout": 0.1,
}
TINY = {"layers": 2, "width": 64, "vocabulary": 2000, "longest": 48, "mean": 20, "query": (8, 16), "dropout": 0.0}
#: Steps before the clock starts.
WARM_UP = 3
SIGMA = 0.6


def make_model(folder: Path, sizes: dict[str, Any]) -> None:
    """A bge-m3 of these sizes with random weights, in files that every contender reads."""
    import torch
    from transformers import XLMRobertaModel

    from ultrarag.adapters import write_declaration
    from ultrarag.io.terminal import quiet_progress
    from ultrarag.types import EncoderSettings

    torch.manual_seed(0)
    width = sizes["width"]
    with quiet_progress():
        XLMRobertaModel(config_of(sizes)).save_pretrained(folder)
    save_tokenizer(folder, sizes)
    for name, size in (("colbert_linear", width), ("sparse_linear", 1)):
        torch.save(torch.nn.Linear(width, size).state_dict(), folder / f"{name}.pt")
    longest = sizes["longest"]
    settings = EncoderSettings(pooling="cls", normalize=True, query_max_length=longest, passage_max_length=longest)
    write_declaration(folder, settings, width)


def config_of(sizes: dict[str, Any]) -> Any:
    """XLM-R as bge-m3 has it."""
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["width"] // 64 if sizes["width"] > 64 else 4,
        intermediate_size=4 * sizes["width"],
        max_position_embeddings=8194,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=sizes["dropout"],
        attention_probs_dropout_prob=sizes["dropout"],
    )


def save_tokenizer(folder: Path, sizes: dict[str, Any]) -> None:
    """A tokenizer of as many words as the model has ids, so that a text has the tokens that it is meant to have."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    last = sizes["vocabulary"] - 1
    words = {f"w{id}": id for id in range(4, last)}
    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **words, "<mask>": last}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    named = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    tokens = {f"{name}_token": token for name, token in named.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=sizes["longest"], **tokens).save_pretrained(
        folder
    )
    # transformers 4, which the peer needs, does not know the class's name of transformers 5
    path = folder / "tokenizer_config.json"
    written = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(written), encoding="utf-8")


def make_plan(model: Path, sizes: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What every contender does, the same in all rounds."""
    draw, longest = Lengths(sizes["longest"]), sizes["longest"]
    mixed = draw(options.texts, sizes["mean"])
    tasks: list[dict[str, Any]] = [
        {"name": "encode, mixed lengths", "kind": "encode", "lengths": mixed},
        {"name": full_name(longest), "kind": "encode", "lengths": [longest] * options.full_texts},
    ]
    for batch in options.batches:
        steps = [
            {"query": draw(batch, *sizes["query"]), "passage": draw(batch * options.group, sizes["mean"])}
            for _ in range(WARM_UP + options.steps)
        ]
        common = {"kind": "train", "group": options.group, "steps": steps}
        tasks.append({**common, "name": f"train unified, batch {batch}", "unified": True, "contenders": LIBRARIES[:2]})
        tasks.append({**common, "name": f"train dense, batch {batch}", "unified": False})
    return {
        "model": str(model),
        "vocabulary": sizes["vocabulary"],
        "longest": longest,
        "device": options.device,
        "precision": options.precision,
        "batch_tokens": options.batch_tokens,
        "batch": options.encode_batch,
        "warm_up": WARM_UP,
        "tasks": [{"contenders": LIBRARIES, **task} for task in tasks],
    }


def full_name(longest: int) -> str:
    """The task whose texts are all of full length."""
    return f"encode, {longest} tokens"


class Lengths:
    """Draws lengths of texts, log-normal, in tokens with the special ones."""

    def __init__(self, most: int) -> None:
        import numpy as np

        self._rng, self._most = np.random.default_rng(0), most

    def __call__(self, count: int, mean: int, most: int | None = None) -> list[int]:
        """So many lengths with this mean, before those above `most` are cut."""
        # the mean of a log-normal distribution is exp(mu + sigma^2 / 2)
        drawn = self._rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, count)
        return [int(length) for length in drawn.clip(4, most or self._most)]
