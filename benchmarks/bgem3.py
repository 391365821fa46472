"""bge-m3's size with all three heads on a CPU: torch and OpenVINO here beside FlagEmbedding, on the same texts.

    python benchmarks/bgem3.py --peer-python .peer/bin/python [--texts 32] [--rounds 3] [--tiny]

Random weights of bge-m3's layout (24 layers of 1,024, 250,002 ids), texts of made-up words with a log-normal number of
tokens, float32, dense vectors, lexical weights and ColBERT vectors of every text. Each contender runs in a process of
its own, so that peak memory is its own, and all take turns; reported are the best of the rounds, in seconds of the
processor, and how far the heads are from FlagEmbedding's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from steps import peak

RESULT = Path(__file__).parent / "results" / "bgem3.json"
PEER = "FlagEmbedding"
#: what ours is called, and the engine it loads with
OURS = {"ultrarag, torch": "torch", "ultrarag, openvino": "openvino"}
BATCH = 32
Heads = dict[str, Any]


def main() -> int:
    """Run the contenders in turn, print what they took and write it."""
    asked = parse()
    if asked.child:
        return serve(asked)
    from gpu_work import FULL, TINY, Lengths, make_model
    from machine import in_turn, origin

    sizes = TINY if asked.tiny else FULL
    report: dict[str, Any] = origin(asked.threads, ("torch", "transformers", "openvino"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder / "model", sizes)
        lengths = Lengths(sizes["longest"])(asked.texts, asked.tokens)
        (folder / "work.json").write_text(json.dumps([lengths, sizes["vocabulary"], sizes["longest"]]))
        contenders = {name: Contender(name, folder, asked) for name in (PEER, *OURS)}
        rounds = [
            {name: contenders[name].run() for name in in_turn(list(contenders), number)}
            for number in range(asked.rounds)
        ]
        found = {name: _best([row[name] for row in rounds]) for name in contenders}
        apart = {name: _apart(folder / f"{name}.npz", folder / f"{PEER}.npz") for name in OURS}
    for name, row in found.items():
        row["speed to FlagEmbedding"] = round(found[PEER]["processor seconds"] / row["processor seconds"], 3)
        row |= apart.get(name, {})
    report |= {"texts": asked.texts, "tokens": sum(lengths), "rounds": asked.rounds, "contenders": found}
    print(json.dumps(report, indent=1))
    if not asked.tiny:
        asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with FlagEmbedding (peer/README.md)")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=60, help="of a text, on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it works; nothing is written")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


class Contender:
    """A library in a process of its own, which encodes all texts once per line that it is sent."""

    def __init__(self, name: str, folder: Path, asked: argparse.Namespace) -> None:
        self.name = name
        python = asked.peer_python if name == PEER else sys.executable
        words = [python, __file__, "--child", name, "--folder", str(folder), "--threads", str(asked.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(asked.threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.run()  # the first forward warms up: a compiled model, caches

    def run(self) -> dict[str, float]:
        """Seconds and MiB of one round."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = next((line for line in self._process.stdout if line.startswith("=> ")), None)
        if line is None:
            sys.exit(f"{self.name} ended with status {self._process.wait()}; its words are above")
        found: dict[str, float] = json.loads(line[3:])
        print(f"{self.name}: {found}", file=sys.stderr, flush=True)
        return found


def serve(asked: argparse.Namespace) -> int:
    """The contender's process."""
    import torch
    from gpu_contenders import made_up_texts

    torch.set_num_threads(asked.threads)
    lengths, vocabulary, longest = json.loads((asked.folder / "work.json").read_text())
    texts = made_up_texts(lengths, vocabulary)
    encode = peer(asked.folder / "model", longest) if asked.child == PEER else ours(asked.folder / "model", asked.child)
    for _ in sys.stdin:
        wall, spent = time.perf_counter(), time.process_time()
        heads = encode(texts)
        report = {"seconds": time.perf_counter() - wall, "processor seconds": time.process_time() - spent}
        np.savez(asked.folder / f"{asked.child}.npz", **heads)
        print("=> " + json.dumps({**report, "peak MiB": peak()}), flush=True)
    return 0


def peer(model: Path, longest: int) -> Callable[[list[str]], Heads]:
    """FlagEmbedding's three heads."""
    from FlagEmbedding import BGEM3FlagModel

    found = BGEM3FlagModel(str(model), use_fp16=False, devices="cpu")
    heads = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}

    def encode(texts: list[str]) -> Heads:
        given = found.encode(texts, batch_size=BATCH, max_length=longest, **heads)
        weights = [{int(token): float(weight) for token, weight in row.items()} for row in given["lexical_weights"]]
        return _flat(given["dense_vecs"], weights, given["colbert_vecs"])

    return encode


def ours(model: Path, name: str) -> Callable[[list[str]], Heads]:
    """Ours, by an engine."""
    from ultrarag import Encoder

    encoder = Encoder.load(model, adapter="bgem3", device="cpu", engine=OURS[name], precision="fp32")

    def encode(texts: list[str]) -> Heads:
        given = encoder.encode(texts, heads=("dense", "sparse", "colbert"), progress=False)
        assert given.dense is not None
        assert given.sparse is not None
        assert given.colbert is not None
        rows = zip(given.sparse.ids, given.sparse.weights, strict=True)
        weights = [{int(token): float(weight) for token, weight in zip(*row, strict=True) if weight} for row in rows]
        return _flat(given.dense, weights, [row[mask > 0] for row, mask in zip(given.colbert, given.mask, strict=True)])

    return encode


def _flat(dense: Any, sparse: list[dict[int, float]], colbert: list[Any]) -> Heads:
    """Arrays that can be kept: the weights by text and id."""
    triples = [(number, token, row[token]) for number, row in enumerate(sparse) for token in sorted(row)]
    return {
        "dense": np.asarray(dense, np.float32),
        "sparse": np.array(triples, np.float64),
        "colbert": np.concatenate([np.asarray(vectors, np.float32) for vectors in colbert]),
    }


def _apart(found: Path, expected: Path) -> dict[str, float]:
    """The least cosine of the vectors, and the largest difference of a weight."""
    with np.load(found) as mine, np.load(expected) as theirs:
        return {
            "least cosine, dense": float((mine["dense"] * theirs["dense"]).sum(-1).min()),
            "largest difference, sparse": float(np.abs(mine["sparse"] - theirs["sparse"]).max()),
            "least cosine, colbert": float((mine["colbert"] * theirs["colbert"]).sum(-1).min()),
        }


def _best(rows: list[dict[str, float]]) -> dict[str, float]:
    """The fewest seconds of the rounds, and the most memory."""
    return {key: round((max if key == "peak MiB" else min)(row[key] for row in rows), 3) for key in rows[0]}


if __name__ == "__main__":
    sys.exit(main())
