"""`ultrarag checkpoint quantise`: int8 for a checkpoint, judged beside float32."""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UsageError
from ultrarag.io import print_result

if TYPE_CHECKING:
    from ultrarag.encoder.engines import Quantised


logger = logging.getLogger("ultrarag")


def add_arguments(parser: Any) -> None:
    """Declare the flags."""
    add = parser.add_argument
    add("path", metavar="CHECKPOINT", help="the checkpoint's folder")
    add("--eval_data", metavar="FOLDER", help="a BEIR folder, on whose test split int8 is judged beside float32")
    add("--unjudged", action="store_true", help="publish without evaluation data: nobody knows what is lost")
    add("--calibration", metavar="PATH", help="passages or training rows (JSONL), or a BEIR folder; default: eval_data")
    add("--tolerance", type=float, default=0.005, help="the loss that is let be (default: 0.005)")
    add("--metric", default="nDCG@10", help="what is judged (default: nDCG@10)")
    add("--output", metavar="DIR", help="a copy of the checkpoint to put it into; default: into the checkpoint")
    add("--adapter", metavar="NAME", help="the kind of model; default: what the folder says")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and print what was measured."""
    _check(arguments)
    from ultrarag.evaluation import read_beir
    from ultrarag.quantise.calibration import Calibration
    from ultrarag.quantise.judging import Terms
    from ultrarag.quantise.quantising import quantise

    collection = read_beir(arguments.eval_data) if arguments.eval_data else None
    found = quantise(
        arguments.path,
        Calibration.read(Path(arguments.calibration or arguments.eval_data)),
        collection,
        terms=Terms(arguments.tolerance, arguments.metric),
        output=arguments.output,
        adapter=arguments.adapter,
        trust_remote_code=arguments.trust_remote_code,
    )
    if collection is None:
        logger.warning("int8 was not judged: nobody knows what it loses here")
    facts = {"checkpoint": arguments.output or arguments.path, "precision": found.precision, **asdict(found)}
    print_result(facts, arguments.json, lambda _: _summary(found, facts["checkpoint"]))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.tolerance >= 0:
        raise UsageError(f"--tolerance is {arguments.tolerance}: it must be 0 or more")
    if not arguments.eval_data and not arguments.unjudged:
        raise UsageError(
            "nothing would be judged: give --eval_data, a BEIR folder with queries and qrels, or say --unjudged"
        )
    if not arguments.eval_data and not arguments.calibration:
        raise UsageError("--calibration is missing: texts to take the ranges of numbers from, a line each (JSONL)")


def _summary(found: Quantised, checkpoint: str) -> str:
    from ultrarag.quantise.judging import in_words

    texts = f"{found.calibration['texts']} texts of {found.calibration['source']}"
    return "\n".join([f"{checkpoint}: {found.precision}, calibrated on {texts}", *map(in_words, found.measured)])
