"""One unified training step (dense + sparse + ColBERT, backward, optimizer) here and in FlagEmbedding, side by side.

    python benchmarks/unified_step.py --peer-python peer/bin/python [--vocabulary 30522 250002] [--batch 16 4]

Each contender is a process of its own, so that its peak memory is its own; they step in turn, on the same token ids.
PEER is a Python with FlagEmbedding (benchmarks/peer/README.md); without it only ours runs. Model: 6 layers of width 384
(all-MiniLM-L6-v2's body) with random weights, BERT at vocabulary 30522 and XLM-R at 250002. Batch 16 (`--batch` for
others, where one contender dies of it), group 2; lengths are log-normal, cut at 64 tokens for queries and 256 for
passages (`--full`: every text is as long as it may be). fp32, AdamW (fused), temperature 0.02, self-distillation from
the first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from machine import processor_name
from steps import peak

QUERIES, GROUP, QUERY_TOKENS, PASSAGE_TOKENS = 16, 2, 64, 256
HERE = Path(__file__).parent
PAGE = HERE / "results" / "unified_step.md"


def main() -> None:
    """Run every vocabulary, print the page, and write it with its JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python with FlagEmbedding 1.4.2")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[30522, 250002])
    parser.add_argument("--batch", type=int, nargs="+", default=[QUERIES], help="queries; a smaller one where one dies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="texts of full length, without padding")
    parser.add_argument("--tiny", action="store_true", help="a small body, to see that everything runs")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--worker", choices=["ultrarag", "FlagEmbedding"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    report: dict[str, Any] = {
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {options.threads} threads",
        "load_average": round(os.getloadavg()[0], 1),
        "lengths": "full" if options.full else "mixed",
        "rows": [
            compare(vocabulary, queries, options) for vocabulary in options.vocabulary for queries in options.batch
        ],
    }
    page = render(report)
    print(page)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(vocabulary: int, queries: int, options: argparse.Namespace) -> dict[str, Any]:
    """Step in turn with both, after one step that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), vocabulary, options.tiny)
        pythons = {"ultrarag": sys.executable, "FlagEmbedding": options.peer_python}
        workers = {name: start(name, python, folder, queries, options) for name, python in pythons.items() if python}
        found: dict[str, Any] = {name: {"steps": [], "before_mib": ask(worker)} for name, worker in workers.items()}
        for number in range(-1, options.rounds):
            for name in list(workers)[:: 1 if number % 2 else -1]:
                try:
                    step = ask(workers[name], f"step {number + 1}")
                except Ended as error:  # such as the kernel's answer to more memory than there is
                    found[name]["ended"] = str(error)
                    del workers[name]
                    continue
                if number >= 0:
                    found[name]["steps"].append(step)
                print(f"vocabulary {vocabulary} round {number}: {name} {step}", file=sys.stderr, flush=True)
        for name, worker in workers.items():
            found[name]["peak_mib"] = ask(worker, "end")
            worker.wait()
    return {"vocabulary": vocabulary, "queries": queries, **summary(found), "contenders": found}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and where both ran the median ratio of the rounds."""
    rows: dict[str, Any] = {
        "median": {
            name: {key: median(step[key] for step in one["steps"]) for key in ("wall", "processor")}
            for name, one in found.items()
            if "ended" not in one
        }
    }
    if len(rows["median"]) == 2:
        ours, theirs = found["ultrarag"], found["FlagEmbedding"]
        pairs = list(zip(ours["steps"], theirs["steps"], strict=True))
        rows["ratio"] = {key: median(a[key] / b[key] for a, b in pairs) for key in ("wall", "processor")}
        rows["ratio"]["peak memory"] = ours["peak_mib"] / theirs["peak_mib"]
        rows["ratio"]["memory of the step"] = (ours["peak_mib"] - ours["before_mib"]) / (
            theirs["peak_mib"] - theirs["before_mib"]
        )
    return rows


class Ended(Exception):
    """A worker is no more."""


def start(name: str, python: str, folder: str, queries: int, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start a contender's process."""
    words = [python, __file__, "--worker", name, "--model", folder, "--threads", str(options.threads)]
    words += ["--batch", str(queries)]
    words += ["--full"] if options.full else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker: subprocess.Popen[str], command: str = "") -> Any:
    """Give a worker a command, and return its answer; without one, what it says when it is ready."""
    assert worker.stdin
    assert worker.stdout
    if command:
        worker.stdin.write(command + "\n")
        worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("=> "):
            return json.loads(line[3:])
    raise Ended(f"ended with {worker.wait()} (-9: killed, most often for its memory)")


def make_model(folder: Path, vocabulary: int, tiny: bool) -> None:
    """A bge-m3 with random weights: transformers' files, a tokenizer for the special ids, and the two linear heads."""
    import torch
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    from ultrarag.testing.tiny import tiny_tokenizer

    kind, config, style = (
        (BertModel, BertConfig, "bert") if vocabulary < 100_000 else (XLMRobertaModel, XLMRobertaConfig, "roberta")
    )
    torch.manual_seed(0)
    width, layers = (64, 2) if tiny else (384, 6)
    tokenizer = tiny_tokenizer(style)
    body = config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind(body).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, size in (("colbert_linear", width), ("sparse_linear", 1)):
        torch.save(torch.nn.Linear(width, size).state_dict(), folder / f"{name}.pt")


def batch(number: int, queries: int, vocabulary: int, full: bool) -> list[dict[str, Any]]:
    """Queries and passages of a step, padded, the same in both processes."""
    import numpy as np
    import torch

    rng = np.random.default_rng(number)
    sides = []
    for count, middle, most in ((queries, 14, QUERY_TOKENS), (queries * GROUP, 110, PASSAGE_TOKENS)):
        lengths = np.clip(rng.lognormal(np.log(middle), 0.6, count).astype(int), 4, most)
        lengths = np.full(count, most) if full else lengths
        ids = torch.zeros(count, int(lengths.max()), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            # as in text, some ids are frequent; the first hundred are left to special tokens
            drawn = 100 + (rng.random(length) ** 4 * (vocabulary - 100)).astype(np.int64)
            ids[row, :length], mask[row, :length] = torch.from_numpy(drawn), 1
        sides.append({"input_ids": ids, "attention_mask": mask})
    return sides


def work(options: argparse.Namespace) -> None:
    """A contender: load, say so, and step when told."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module, step = {"ultrarag": ours, "FlagEmbedding": theirs}[options.worker](options.model)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-5, fused=True)
    vocabulary = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    say(resident())
    for line in sys.stdin:
        word, *number = line.split()
        if word == "end":
            say(peak())
            return
        sides = batch(int(number[0]), options.batch[0], vocabulary, options.full)
        wall, spent = time.perf_counter(), time.process_time()
        loss = step(sides)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - spent}
        say({**seconds, "loss": float(loss.detach())})


def ours(folder: str) -> tuple[Any, Any]:
    """The module, and a function from a batch to its loss."""
    from ultrarag import Encoder
    from ultrarag.finetune.step.trainable import Trainable
    from ultrarag.loss_arguments import LossArguments

    encoder = Encoder.load(folder, adapter="bgem3", device="cpu")
    module = Trainable(encoder, ("dense", "sparse", "colbert")).train()
    arguments = LossArguments(temperature=0.02, group_size=GROUP, use_self_distill=True, self_distill_start_step=0)

    steps = itertools.count()  # self-distillation begins with the second, as with the peer

    def step(sides: Any) -> Any:
        query, passage = module(sides)
        return encoder.adapter.loss(encoder.model, query, passage, None, next(steps), arguments)

    return module, step


def theirs(folder: str) -> tuple[Any, Any]:
    """The same of FlagEmbedding."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import EncoderOnlyEmbedderM3Model, EncoderOnlyEmbedderM3Runner
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token  # it drops four special ids, which BERT calls so
    module = EncoderOnlyEmbedderM3Model(
        EncoderOnlyEmbedderM3Runner.get_model(folder),
        tokenizer=tokenizer,
        temperature=0.02,
        sentence_pooling_method="cls",
        normalize_embeddings=True,
        unified_finetuning=True,
        use_self_distill=True,
        self_distill_start_step=0,
    ).train()
    return module, lambda sides: module(sides[0], sides[1]).loss


def say(answer: Any) -> None:
    """Answer the parent; libraries print to stdout too."""
    print("=> " + json.dumps(answer), flush=True)


def resident() -> float:
    """Resident memory in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Unified training step",
        "",
        f"Group {GROUP}, {report['lengths']} lengths, fp32, {report['machine']}, load average "
        f"{report['load_average']}. Peak memory is the process's, its libraries included; that of the step is the "
        "growth over the loaded model. Written by `benchmarks/unified_step.py`.",
        "",
        "| vocabulary | batch | contender | wall s | processor s | peak MiB | of the step MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        queries = row.get("queries", QUERIES)
        for name, one in row["contenders"].items():
            if "ended" in one:
                lines.append(f"| {row['vocabulary']} | {queries} | {name}: {one['ended']} | | | | |")
                continue
            middle = row["median"][name]
            lines.append(
                f"| {row['vocabulary']} | {queries} | {name} | {middle['wall']:.2f} | {middle['processor']:.2f} "
                f"| {one['peak_mib']:.0f} | {one['peak_mib'] - one['before_mib']:.0f} |"
            )
        if ratio := row.get("ratio"):
            lines.append(
                f"| {row['vocabulary']} | {queries} | **ultrarag / FlagEmbedding** | **{ratio['wall']:.2f}** "
                f"| **{ratio['processor']:.2f}** | **{ratio['peak memory']:.2f}** "
                f"| **{ratio['memory of the step']:.2f}** |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
