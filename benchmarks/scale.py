"""What it costs to encode a corpus again: the tables of docs/scale.md, out of measured rates and named assumptions.

    python benchmarks/scale.py                            # writes the tables into docs/scale.md
    python benchmarks/scale.py --print --tokens 250 --mfu 0.3 --peak-tflops 312 --gpus 16

What was measured is read from `benchmarks/results/live_index.json`; everything else is an `Assumptions` field, a flag
each, so that your own rates can be put in.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scale.md"
MEASURED = HERE / "results" / "live_index.json"
CORPORA = {"10M": 10**7, "100M": 10**8, "1B": 10**9}


@dataclass(frozen=True)
class Assumptions:
    """What was not measured here; the defaults are bge-m3 on H100s or H200s."""

    #: tokens of a passage, on average
    tokens: float = 180.0
    #: mean of the squares of the lengths, over the square of the mean (1 for equal lengths)
    spread: float = 1.4
    layers: int = 24
    width: int = 1024
    #: width of the feed-forward layer
    inner: int = 4096
    #: bf16 operations of a GPU in 1e12 per second: NVIDIA's data sheet
    peak_tflops: float = 989.0
    #: the share of them that encoding reaches; 0.45 is the target for 512-token passages, not yet measured on a GPU
    mfu: float = 0.30
    #: GPUs at work
    gpus: int = 8
    #: width of the dense vector, and of a token's vector for ColBERT
    dense: int = 1024
    colbert: int = 1024
    #: lexical weights of a passage: distinct tokens
    lexical: float = 110.0
    #: bytes of text of a token
    text_bytes: float = 4.5
    #: bytes of an edge of the graph, and edges of a node on its lowest level (2 x m, m = 16)
    edge_bytes: int = 4
    edges: int = 32
    #: bytes of payload of a point: id, facts for filters
    payload: float = 100.0
    #: processor cores of the vector servers, and the width at which the graph's rate was measured
    cores: int = 64
    measured_width: int = 384
    #: bytes that the network between encoders and vector servers carries in a second
    network: float = 1.25e9
    #: bytes of a number on the wire: qdrant-client and pymilvus send fp32
    wire: int = 4


@dataclass(frozen=True)
class Measured:
    """What `live_index.json` says."""

    machine: str
    #: passages per second of one core: writing and building the graph of 100,000, qdrant-edge
    graph_rate: float
    #: bytes per passage of that graph beside the fp32 vectors
    graph_extra: float
    #: of a whole swap, and milliseconds of it for which writers waited
    swap_seconds: float
    writers_waited_ms: float
    #: of the live index that was swapped
    passages: int


def read_measured(path: Path = MEASURED) -> Measured:
    """Read what was measured."""
    report = json.loads(path.read_text(encoding="utf-8"))
    dense = max(
        (row for row in report["search"] if row["contender"] == "ultrarag dense"), key=lambda row: row["passages"]
    )
    swap = report["live"]["searches"]["dense + BM25"]["phases"]["swap"]
    return Measured(
        machine=report["machine"],
        graph_rate=dense["passages"] / dense["build"]["processor_seconds"],
        graph_extra=dense["disk_bytes_per_passage"] - 4 * report["dim"],
        swap_seconds=swap["seconds"],
        writers_waited_ms=swap["writers_waited_ms"],
        passages=report["live"]["passages"],
    )


def flops(a: Assumptions) -> float:
    """Operations of one passage's forward pass, as `ultrarag.finetune.step.callbacks` counts them."""
    weights = a.layers * (4 * a.width**2 + 2 * a.width * a.inner)
    return 2.0 * weights * a.tokens + 4.0 * a.layers * a.width * a.spread * a.tokens**2


def passages_per_gpu_second(a: Assumptions) -> float:
    """Passages that one GPU encodes in a second."""
    return a.peak_tflops * 1e12 * a.mfu / flops(a)


def graph_rate(a: Assumptions, m: Measured) -> float:
    """Passages per second that all cores put into graphs; the cost of a distance grows with the width."""
    return a.cores * m.graph_rate * a.measured_width / a.dense


def kinds(a: Assumptions) -> dict[str, float]:
    """Bytes of one passage, by what is stored."""
    return {
        "dense fp32": 4.0 * a.dense,
        "dense fp16": 2.0 * a.dense,
        "dense int8": 1.0 * a.dense,
        "dense binary": a.dense / 8,
        "graph (HNSW, m = 16)": float(a.edges * a.edge_bytes),
        "payload": a.payload,
        "texts, in SQLite": a.text_bytes * a.tokens,
        "sparse (id and fp32 weight)": 8.0 * a.lexical,
        "ColBERT fp32": 4.0 * a.colbert * a.tokens,
        "ColBERT fp16": 2.0 * a.colbert * a.tokens,
        "ColBERT int8": 1.0 * a.colbert * a.tokens,
        "ColBERT binary": a.colbert / 8 * a.tokens,
    }


def encoding(a: Assumptions) -> str:
    """Tokens, GPU hours and days."""
    rate = passages_per_gpu_second(a)
    rows = []
    for name, count in CORPORA.items():
        hours = count / rate / 3600
        rows.append([name, f"{count * a.tokens:.3g}", _number(hours), _time(hours / a.gpus)])
    return table(["passages", "tokens", "GPU hours", f"on {a.gpus} GPUs"], rows)


def storing(a: Assumptions) -> str:
    """Bytes of each representation."""
    rows = [
        [kind, _number(each), *(_bytes(each * count) for count in CORPORA.values())] for kind, each in kinds(a).items()
    ]
    return table(["stored", "bytes a passage", *CORPORA], rows)


def swapping(a: Assumptions, m: Measured) -> str:
    """How long each stage of a refresh takes, and which of them decides."""
    rows = []
    for name, count in CORPORA.items():
        colbert = count * a.wire * a.colbert * a.tokens / a.network / 3600
        stages = {
            "encoding": count / (passages_per_gpu_second(a) * a.gpus) / 3600,
            "graph": count / graph_rate(a, m) / 3600,
            "sending": count * (a.wire * a.dense + 8 * a.lexical) / a.network / 3600,
        }
        slowest = max(stages, key=lambda stage: stages[stage])
        rows.append([name, *(_time(hours) for hours in stages.values()), slowest, _time(colbert)])
    return table(["passages", *stages, "the limit", "sending ColBERT too"], rows)


def rates(a: Assumptions, m: Measured) -> str:
    """What the other tables are made of, each with where it comes from."""
    rows = [
        ["operations of a passage", f"{flops(a):.3g}", f"formula, {a.tokens:g} tokens"],
        ["passages per GPU second", _number(passages_per_gpu_second(a)), f"{a.peak_tflops:g} TFLOPS x {a.mfu:g}"],
        ["tokens per GPU second", _number(passages_per_gpu_second(a) * a.tokens), "the same"],
        [
            f"graph: passages per core second, {a.measured_width} wide",
            _number(m.graph_rate),
            f"measured: {m.machine}",
        ],
        [f"graph: passages per second, {a.dense} wide, {a.cores} cores", _number(graph_rate(a, m)), "scaled from it"],
        ["disk beside the vectors, bytes a passage", _number(m.graph_extra), "measured: graph, ids, payload, log"],
        [f"a swap of {m.passages:,} passages, seconds", f"{m.swap_seconds:.2f}", "measured: loads a model, checks"],
        ["writers wait at the flip, ms", f"{m.writers_waited_ms:.1f}", "measured"],
    ]
    return table(["rate", "value", "from"], rows)


def tables(a: Assumptions, m: Measured) -> dict[str, str]:
    """Every table of the page, by the name of its place."""
    return {"rates": rates(a, m), "encoding": encoding(a), "storing": storing(a), "swapping": swapping(a, m)}


def filled(page: str, found: dict[str, str]) -> str:
    """The page with its tables between `<!-- NAME -->` and `<!-- end -->` replaced."""
    for name, text in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", flags=re.S)
        if not pattern.search(page):
            raise ValueError(f"the page has no place '<!-- {name} -->' ... '<!-- end -->' for a table")
        page = pattern.sub(lambda match, text=text: f"{match[1]}\n{text}\n{match[2]}", page)  # type: ignore[misc]
    return page


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MB"


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:.2g} days"


def parse(arguments: list[str] | None = None) -> tuple[Assumptions, Any]:
    """A flag for each assumption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables and leave the page as it is")
    for field in fields(Assumptions):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        parser.add_argument(flag, type=type(default), default=default, help=f"({default})")
    asked = parser.parse_args(arguments)
    return Assumptions(**{field.name: getattr(asked, field.name) for field in fields(Assumptions)}), asked


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or print."""
    assumptions, asked = parse(arguments)
    found = tables(assumptions, read_measured())
    if asked.print or assumptions != Assumptions():
        print("\n".join(found.values()))
        return 0
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
