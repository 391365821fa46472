"""Score (query, passage) pairs with FlagEmbedding's FlagReranker, in the peer's environment (see README.md).

    .peer/bin/python benchmarks/peer/score_pairs.py CHECKPOINT PAIRS.json OUTPUT.json [--max-length 512]

PAIRS.json holds a list of [query, passage]; OUTPUT.json gets the list of raw scores.
"""

import argparse
import json
from pathlib import Path

from FlagEmbedding import FlagReranker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    pairs = json.loads(args.pairs.read_text(encoding="utf-8"))
    model = FlagReranker(str(args.checkpoint), use_fp16=False, devices="cpu", max_length=args.max_length)
    args.output.write_text(json.dumps(model.compute_score(pairs)), encoding="utf-8")


if __name__ == "__main__":
    main()
