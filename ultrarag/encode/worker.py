"""`python -m ultrarag.encode.worker JSON`: encode one shard of a corpus on one device; for `encode_corpus`."""

from __future__ import annotations

import ctypes
import json
import signal
import sys
from pathlib import Path

from ultrarag.encode.corpus import ModelChoice, encode_shard
from ultrarag.errors import UltraragError
from ultrarag.retrieve.passages import passage_file


def main() -> int:
    """Encode; errors go to stderr."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end with the parent
    asked = json.loads(sys.argv[1])
    try:
        encoder = ModelChoice(**asked["model"]).load(asked["device"])
        with passage_file(asked["corpus"]) as passages:
            encode_shard(
                encoder, Path(asked["folder"]), asked["shard"], passages, asked["model"]["batch_tokens"], False
            )
    except UltraragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
