"""Token vectors for `late_interaction.py`: real ones of a small model over data sets, and made-up passages of them.

No published late-interaction model was at hand, so that one is made of a small real model: its last
hidden states, projected to 128 dimensions by the directions in which they vary most, at unit length, punctuation left
out. It was never trained to be compared token by token, and is weaker for that than a ColBERT; its vectors are those
of real texts all the same. Made-up passages mix the token vectors of two real ones, and noise.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ultrarag import Encoder
from ultrarag.types import Embeddings, Passage

DIM, QUERY_TOKENS, PASSAGE_TOKENS = 128, 32, 128
#: Passages whose token vectors the projection is chosen by.
SAMPLE = 200
#: Passages encoded, or made, at a time.
BLOCK = 512
#: Of a made-up token: the share of another one, and the length of the noise.
MIXED, NOISE = 0.35, 0.35


def model(folder: Path, texts: list[str]) -> Path:
    """The late-interaction model, in the layout of sentence-transformers; made where it is missing."""
    if (folder / "modules.json").exists():
        return folder
    from encode import small_model

    small = Path(small_model())
    stage = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(small, stage, ignore=shutil.ignore_patterns("1_Pooling", "modules.json", "README.md", "data_*"))
    _write_projection(stage, directions(small, texts))
    stage.rename(folder)
    return folder


def directions(small: Path, texts: list[str]) -> np.ndarray:
    """The directions of most variance of the last hidden states, (DIM, width)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, backbone = AutoTokenizer.from_pretrained(small), AutoModel.from_pretrained(small).eval()
    total = torch.zeros(backbone.config.hidden_size, backbone.config.hidden_size)
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            texts[start : start + 32], truncation=True, max_length=PASSAGE_TOKENS, padding=True, return_tensors="pt"
        )
        with torch.inference_mode():
            states = torch.nn.functional.normalize(backbone(**batch).last_hidden_state, dim=-1)
        held = states[batch["attention_mask"].bool()]
        total += held.T @ held
    return np.ascontiguousarray(torch.linalg.eigh(total).eigenvectors[:, -DIM:].T.numpy())


def _write_projection(folder: Path, weight: np.ndarray) -> None:
    from safetensors.numpy import save_file

    base = "sentence_transformers.base.modules"
    names = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    dense = {"in_features": weight.shape[1], "out_features": DIM, "bias": False, **names}
    modules = {
        "": (f"{base}.transformer.Transformer", None),
        "1_Dense": (f"{base}.dense.Dense", {**dense, "activation_function": "torch.nn.modules.linear.Identity"}),
        "2_MultiVectorMask": (
            "sentence_transformers.multi_vector_encoder.modules.MultiVectorMask",
            {"skiplist_words": list(string.punctuation), "skiplist_tasks": ["document"]},
        ),
        "3_Normalize": (f"{base}.normalize.Normalize", names),
    }
    for place, (_, config) in modules.items():
        if config is not None:
            (folder / place).mkdir()
            _dump(folder / place / "config.json", config)
    save_file({"linear.weight": weight}, str(folder / "1_Dense" / "model.safetensors"))
    rows = [{"idx": n, "name": str(n), "path": p, "type": kind} for n, (p, (kind, _)) in enumerate(modules.items())]
    _dump(folder / "modules.json", rows)
    library = {"model_type": "MultiVectorEncoder", "prompts": {"query": "", "document": ""}}
    _dump(folder / "config_sentence_transformers.json", {**library, "similarity_fn_name": "maxsim"})
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": output},
        "module_output_name": "token_embeddings",
        "max_seq_length": PASSAGE_TOKENS,
        "query_length": QUERY_TOKENS,
    }
    _dump(folder / "sentence_bert_config.json", transformer)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def judgements(data: Path) -> dict[str, dict[str, int]]:
    """The test judgements of a data set in BEIR's layout."""
    found: dict[str, dict[str, int]] = {}
    for line in (data / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, passage, grade = line.split("\t")
        found.setdefault(query, {})[passage] = int(grade)
    return found


def passages_of(data: Path, most: int) -> list[Passage]:
    """Passages of a data set, in the order of its corpus: those judged, and others up to so many in all."""
    with open(data / "corpus.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    judged = {id for held in judgements(data).values() for id in held}
    others = [row["_id"] for row in rows if row["_id"] not in judged]
    order = np.random.default_rng(0).permutation(len(others))[: max(0, most - len(judged))]
    kept = judged | {others[place] for place in order}
    return [Passage(row["_id"], row["text"], row.get("title", "")) for row in rows if row["_id"] in kept]


def queries_of(data: Path) -> dict[str, str]:
    """The test queries of a data set, by id."""
    judged = judgements(data)
    with open(data / "queries.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["_id"]: row["text"] for row in rows if row["_id"] in judged}


class Ragged:
    """Token vectors of many texts, one behind the other, in files."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Args: (tokens, DIM) float16; where those of each text end, (texts,) int64."""
        self.tokens, self.starts, self.ends = tokens, np.append(0, ends[:-1]), ends

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, number: int) -> np.ndarray:
        """The token vectors of a text, (tokens, DIM) float32."""
        return self.tokens[self.starts[number] : self.ends[number]].astype(np.float32)

    def embeddings(self, start: int, stop: int) -> Embeddings:
        """Those of texts start to stop, padded."""
        return padded([self.row(number) for number in range(start, min(stop, len(self)))])


def padded(rows: list[np.ndarray]) -> Embeddings:
    """Embeddings of token vectors."""
    longest = max(len(row) for row in rows)
    vectors, mask = np.zeros((len(rows), longest, DIM), np.float32), np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        vectors[place, : len(row)], mask[place, : len(row)] = row, 1
    return Embeddings(colbert=vectors, mask=mask)


def encoded(folder: Path, name: str, encoder: Encoder, texts: list[str] | list[Passage], kind: str) -> Ragged:
    """The token vectors of texts; kept in a folder."""
    files = [folder / f"{name}-{part}.npy" for part in ("tokens", "ends")]
    if not all(file.exists() for file in files):
        parts, counts = [], []
        for start in range(0, len(texts), BLOCK):
            found = encoder.encode(texts[start : start + BLOCK], kind, progress=False)  # type: ignore[arg-type]
            held = found.mask.astype(bool)
            parts.append(found.colbert[held].astype(np.float16))
            counts.append(held.sum(1))
        np.save(files[1], np.cumsum(np.concatenate(counts)))
        np.save(files[0], np.concatenate(parts))
    return Ragged(np.load(files[0], mmap_mode="r"), np.load(files[1]))


def made(real: list[Ragged], size: int, tokens: int) -> Iterator[np.ndarray]:
    """Blocks of made-up passages, (BLOCK, tokens, DIM) float32, the same at every call."""
    rng = np.random.default_rng(1)
    noise = NOISE / DIM**0.5 * rng.standard_normal((65_536, DIM), np.float32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start) * tokens
        block = _runs(rng, real, count, tokens) + MIXED * _runs(rng, real, count, tokens)
        block += noise[rng.integers(len(noise), size=count)]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        yield block.reshape(-1, tokens, DIM)


def _runs(rng: np.random.Generator, real: list[Ragged], count: int, length: int) -> np.ndarray:
    """So many tokens in runs of `length`, each from a place chosen at random in the texts, (count, DIM) float32."""
    parts = []
    for _ in range(count // length):
        held = real[int(rng.integers(len(real)))].tokens
        start = int(rng.integers(len(held) - length))
        parts.append(held[start : start + length])
    return np.concatenate(parts).astype(np.float32)
