"""Load a checkpoint in FlagEmbedding and encode texts, in the peer's environment (see README.md).

    .peer/bin/python benchmarks/peer/load_checkpoint.py CHECKPOINT TEXTS.json OUTPUT.npz [--max-length 512]

TEXTS.json holds a list of strings. OUTPUT.npz gets `dense` (texts, dim), `colbert/<i>` (tokens, dim) and
`sparse/<i>/ids`, `sparse/<i>/weights` for text i; with --dense-only, for checkpoints without bge-m3's heads, `dense`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from FlagEmbedding import BGEM3FlagModel, FlagModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dense-only", action="store_true", help="load with FlagModel")
    parser.add_argument("--pooling", default="cls", choices=["cls", "mean", "last_token"])
    args = parser.parse_args()
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    np.savez(args.output, **(encode_dense if args.dense_only else encode_all)(args, texts))


def encode_dense(args: argparse.Namespace, texts: list[str]) -> dict[str, np.ndarray]:
    model = FlagModel(str(args.checkpoint), use_fp16=False, devices="cpu", pooling_method=args.pooling)
    return {"dense": model.encode(texts, max_length=args.max_length)}


def encode_all(args: argparse.Namespace, texts: list[str]) -> dict[str, np.ndarray]:
    for head in ("colbert_linear.pt", "sparse_linear.pt"):
        if not (args.checkpoint / head).is_file():
            raise SystemExit(
                f"'{args.checkpoint / head}' is missing: the peer would use a random one; try --dense-only"
            )
    model = BGEM3FlagModel(str(args.checkpoint), use_fp16=False, devices="cpu", pooling_method=args.pooling)
    heads = {"return_dense": True, "return_sparse": True, "return_colbert_vecs": True}
    output = model.encode(texts, max_length=args.max_length, **heads)
    arrays = {"dense": output["dense_vecs"]}
    for i, (weights, vectors) in enumerate(zip(output["lexical_weights"], output["colbert_vecs"], strict=True)):
        arrays[f"colbert/{i}"] = vectors
        arrays[f"sparse/{i}/ids"] = np.array(sorted(int(token) for token in weights), np.int64)
        arrays[f"sparse/{i}/weights"] = np.array([weights[str(t)] for t in arrays[f"sparse/{i}/ids"]], np.float32)
    return arrays


if __name__ == "__main__":
    main()
