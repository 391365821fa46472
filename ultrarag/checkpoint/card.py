"""The model card: README.md of a checkpoint, with the parent, the data, the arguments and the metrics."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

from ultrarag.checkpoint.manifest import Manifest, Training
from ultrarag.checkpoint.metadata import front_matter


def model_card(manifest: Manifest, pairs: bool, longest: tuple[int | None, int | None]) -> str:
    """Return the card's Markdown, with the front matter that model hubs read.

    Args:
        pairs: whether the model reads (query, passage) pairs.
        longest: the most tokens of a query and of a passage, or pair.
    """
    front = front_matter(manifest, pairs)
    settings = manifest.settings
    facts = [("adapter", manifest.adapter), ("heads", ", ".join(settings.heads))]
    if pairs:
        facts += [("longest pair", f"{longest[1]} tokens")]
    else:
        facts += [
            ("pooling", settings.pooling or "-"),
            ("unit length", "yes" if settings.normalize else "no"),
            ("longest query / passage", f"{longest[0]} / {longest[1]} tokens"),
        ]
    facts += [("fingerprint", manifest.fingerprint)]
    if manifest.sides:
        facts += [(f"{kind} side", _side(side)) for kind, side in sorted(manifest.sides.items(), reverse=True)]
    usage = _pair_usage() if pairs else _usage(manifest)
    lines = [f"# {'Reranker' if pairs else 'Embedding model'}", "", *_table(("", ""), facts), "", *usage]
    if manifest.training:
        lines += _training(manifest.training)
    return "\n".join(front + lines) + "\n"


def _pair_usage() -> list[str]:
    return [
        "## Use",
        "",
        "```python",
        "from ultrarag import Encoder",
        "",
        "encoder = Encoder.load(path)",
        'scores = encoder.score([("a query", "a passage")])',
        "```",
        "",
    ]


def _side(side: dict[str, Any]) -> str:
    maps = f", {len(side['maps'])} linear map(s) behind the model {side['unmapped'][:12]}" if side["maps"] else ""
    return f"{side['fingerprint']}{maps}"


def _usage(manifest: Manifest) -> list[str]:
    if manifest.sides:
        return _usage_of_sides()
    return [
        "## Use",
        "",
        "```python",
        "from ultrarag import Encoder",
        "",
        "encoder = Encoder.load(path)",
        'vectors = encoder.encode(["a passage"], kind="passage")',
        "```",
        "",
        "The dense vectors also come from `SentenceTransformer(path)`"
        + (
            ", all heads from FlagEmbedding's `BGEM3FlagModel(path)`."
            if manifest.adapter == "bgem3" and len(manifest.settings.heads) > 1
            else "."
        ),
        "",
    ]


def _usage_of_sides() -> list[str]:
    return [
        "## Use",
        "",
        "Queries and passages are encoded differently.",
        "",
        "```python",
        "from ultrarag import Encoder",
        "",
        "encoder = Encoder.load(path)",
        'queries = encoder.encode(["a query"], kind="query")',
        'passages = encoder.encode(["a passage"], kind="passage")',
        "```",
        "",
        "Where the folder has `modules.json`, the vectors also come from `encode_query` and `encode_document` of",
        "`SentenceTransformer(path)`; a folder `query_low_rank` needs ultrarag there, and `trust_remote_code=True`.",
        "",
    ]


def _training(training: Training) -> list[str]:
    lines = ["## Training", "", f"Parent: {_plain(training.parent_name or '-')} (`{training.parent}`)", ""]
    lines += [f"Optimizer steps: {training.steps}" + (f"; loss {training.loss:.4f}" if training.loss else ""), ""]
    lines += _table(("data", "rows", "sha256"), [(d["name"], d["rows"], d["sha256"][:16]) for d in training.data])
    if training.merge:
        merge = training.merge
        lines += [
            "",
            f"Weights: {merge['weight']:g} of the trained ones, the rest of {_plain(merge['with'])} "
            f"({_plain(merge['path'])}).",
        ]
    if training.metrics:
        names = sorted({name for values in training.metrics.values() for name in values})
        columns = list(training.metrics)
        rows = [(name, *(f"{training.metrics[c].get(name, float('nan')):.4f}" for c in columns)) for name in names]
        lines += ["", "## Evaluation", "", *_table(("metric", *columns), rows)]
    arguments = json.dumps(training.arguments, indent=2, ensure_ascii=False, sort_keys=True, default=str)
    return [*lines, "", "## Arguments", "", "```json", arguments, "```"]


def _table(header: tuple[object, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    lines = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in [header, *rows]]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _plain(value: object) -> str:
    """A name from outside as one line of Markdown that shows it as it is: no markup, no HTML, no new table cell."""
    line = "".join(character if character.isprintable() else " " for character in str(value))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(line, quote=False))
