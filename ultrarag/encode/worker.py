"""`python -m ultrarag.encode.worker JSON`: encode one shard of a corpus on one device; for `encode_corpus`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ultrarag.encode.corpus import ModelChoice, encode_shard
from ultrarag.io import end_with_parent, run_command
from ultrarag.retrieve.passages import passage_file


def main() -> int:
    """Encode; errors go to stderr."""
    end_with_parent()
    return run_command(lambda: _encode(json.loads(sys.argv[1])))


def _encode(asked: dict[str, Any]) -> None:
    encoder = ModelChoice(**asked["model"]).load(asked["device"])
    with passage_file(asked["corpus"]) as passages:
        encode_shard(encoder, Path(asked["folder"]), asked["shard"], passages, asked["model"]["batch_tokens"], False)


if __name__ == "__main__":
    sys.exit(main())
