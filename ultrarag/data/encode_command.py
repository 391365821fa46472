"""`ultrarag data encode`: the vectors of a corpus on disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ultrarag.encode import FORMATS, Compression, EncodedCorpus, ModelChoice, encode_corpus
from ultrarag.io import print_result


def main(argv: Sequence[str]) -> int:
    """Encode, and say what was written."""
    arguments = _parser().parse_args(argv)
    model = ModelChoice(
        arguments.model_name_or_path,
        arguments.adapter,
        arguments.precision,
        arguments.passage_max_length,
        arguments.batch_tokens,
    )
    found = encode_corpus(
        model,
        arguments.input_file,
        arguments.output,
        heads=arguments.heads,
        compression=Compression(arguments.format, arguments.truncate_dim),
        devices=arguments.devices or (None,),
        overwrite=arguments.overwrite,
    )
    print_result(_facts(found), arguments.json, lambda _: _text(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ultrarag data encode", description="Encode a corpus to disk; a killed run goes on where it stopped."
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, metavar="MODEL", help="checkpoint folder, or name on the Hub")
    add("--adapter", metavar="NAME", help="the kind of model; not needed for a checkpoint of ours")
    add("--input_file", "--corpus", required=True, metavar="PATH", help="JSONL of passages, or a BEIR folder")
    add("--output", "-o", "--output_dir", required=True, metavar="DIR", help="the folder of the vectors")
    add("--heads", nargs="+", metavar="HEAD", help="default: all that the model has")
    add("--format", choices=FORMATS, default="float32", help="of the dense vectors' numbers (default: float32)")
    add("--truncate_dim", type=int, metavar="N", help="keep the first N dimensions (Matryoshka models)")
    add("--devices", "--device", nargs="+", metavar="NAME", help="one process for each, such as cuda:0 cuda:1")
    add("--precision", choices=["fp32", "bf16", "fp16", "auto"], default="fp32", help="of the forward (default: fp32)")
    add("--passage_max_length", type=int, metavar="N", help="longest passage in tokens")
    add("--batch_tokens", type=int, metavar="N", help="padded tokens per forward")
    add("--overwrite", action="store_true", help="replace what another model, corpus or format made")
    add("--json", action="store_true", help="print JSON")
    return parser


def _facts(found: EncodedCorpus) -> dict[str, object]:
    size = sum(path.stat().st_size for path in found.folder.rglob("*") if path.is_file())
    names = ("heads", "dim", "compression", "fingerprint")
    return {"output": str(found.folder), "passages": len(found), "bytes": size, **{n: found.info[n] for n in names}}


def _text(found: EncodedCorpus) -> str:
    facts = _facts(found)
    return f"{facts['passages']} passages, {facts['bytes']} bytes, {', '.join(found.info['heads'])}: {facts['output']}"
