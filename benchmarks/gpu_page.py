"""What `gpu.py` found: medians, MFU and ratios of a plan's runs, and the page that shows them."""

from __future__ import annotations

from statistics import median
from typing import Any

from gpu_work import config_of


def summarise(report: dict[str, Any], plan: dict[str, Any], runs: list[dict[str, Any]], peak: float | None) -> None:
    """Put into the report what the rounds so far say of every task."""
    report["device"] = next((told["device"] for told in report["contenders"].values()), "unknown")
    report["peak_tflops"] = peak or known_peak(report["device"], report["precision"])
    report["tasks"] = [task_row(task, plan, runs, report) for task in plan["tasks"]]


def known_peak(device: str, precision: str) -> float | None:
    """What a GPU of this name can do in 1e12 operations a second, half precision; None where that is not known."""
    from ultrarag.finetune.step.callbacks import PEAK_TFLOPS

    known = (float(peak) for part, peak in PEAK_TFLOPS.items() if part in device)
    return None if precision == "fp32" else next(known, None)


def task_row(
    task: dict[str, Any], plan: dict[str, Any], runs: list[dict[str, Any]], report: dict[str, Any]
) -> dict[str, Any]:
    """One task: what it is made of, each contender's medians, and ours beside each peer's, round by round."""
    steps = task.get("steps", [])[plan["warm_up"] :]
    lengths = task.get("lengths") or [length for step in steps for side in step.values() for length in side]
    flops = operations(lengths, report["sizes"], training=bool(steps))
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for name, answers in run.items():
            if name in task["contenders"]:
                found.setdefault(name, []).append(answers.get(task["name"]) or answers.get("ended") or {"failed": "?"})
    contenders = {name: contender(answers, lengths, flops, report["peak_tflops"]) for name, answers in found.items()}
    row: dict[str, Any] = {"name": task["name"], "texts": len(lengths), "tokens": sum(lengths), "flops": flops}
    return {**row, "contenders": contenders, "ultrarag to": ratios(found)}


def contender(answers: list[dict[str, Any]], lengths: list[int], flops: float, peak: float | None) -> dict[str, Any]:
    """Medians over the rounds; or why there are none."""
    failed = next((answer["failed"] for answer in answers if "failed" in answer), None)
    if failed:
        return {"failed": failed}
    seconds = median(answer["seconds"] for answer in answers)
    row = {
        "seconds": [answer["seconds"] for answer in answers],
        "tokens_per_second": sum(lengths) / seconds,
        "peak_gib": max(answer["peak_gib"] for answer in answers),
    }
    if peak:
        row["mfu"] = flops / seconds / (peak * 1e12)
    return row | {key: answers[0][key] for key in ("first_loss", "last_loss") if key in answers[0]}


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Our rate and memory beside each peer's (the rate round by round), and how far the vectors agree."""
    ours = found.get("ultrarag", [{"failed": "left out"}])
    rows = {}
    for name, theirs in found.items():
        if name == "ultrarag" or any("failed" in answer for answer in (*ours, *theirs)):
            continue
        pairs = list(zip(ours, theirs, strict=True))
        rows[name] = {
            "rate": median(b["seconds"] / a["seconds"] for a, b in pairs),
            "memory": max(a["peak_gib"] for a in ours) / max(b["peak_gib"] for b in theirs),
        }
        if "vectors" in ours[0]:
            rows[name]["least_cosine"] = min(map(cosine, ours[0]["vectors"], theirs[0]["vectors"]))
    return rows


def cosine(a: list[float], b: list[float]) -> float:
    """Of two vectors."""
    dot, squares = sum(x * y for x, y in zip(a, b, strict=True)), (sum(x * x for x in v) for v in (a, b))
    return float(dot / (next(squares) * next(squares)) ** 0.5)


def operations(lengths: list[int], sizes: dict[str, Any], training: bool) -> float:
    """What the texts' own tokens ask of the backbone, without padding and heads (`ultrarag.finetune.step`)."""
    import torch
    from transformers import XLMRobertaModel

    from ultrarag.finetune.step.callbacks import Throughput

    with torch.device("meta"):
        model = XLMRobertaModel(config_of(sizes), add_pooling_layer=False)
    counter = Throughput(model, torch.device("cpu"), half=False)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    counter.count([{"input_ids": mask, "attention_mask": mask}])
    return counter.flops() / (1 if training else 3)


def render(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    sizes, peak = report["sizes"], report["peak_tflops"]
    lines = [
        "# A model of bge-m3's size on a GPU",
        "",
        f"{report['device']} on {report['machine']}; {report['date']}. XLM-R of {sizes['layers']} layers, "
        f"{sizes['width']} wide, vocabulary {sizes['vocabulary']}, random weights, {report['precision']}; medians of "
        f"{report['rounds']} rounds in turn, each contender in a process of its own. Tokens are those of the texts, "
        "padding is not counted. MFU is the share of "
        + (f"{peak:g} TFLOP/s" if peak else "the device's peak, which is not known here (`--peak-tflops`)")
        + " that the texts' own tokens ask for. Peak memory is torch's on a GPU, and on a CPU that of the process. A "
        "training step is forward, loss, backward and AdamW. Written by `benchmarks/gpu.py`.",
        "",
        *versions(report),
        "",
        "| task | contender | tokens/s | MFU | peak GiB | ultrarag's rate to it | its memory to it | least cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line(task, name, row) for task in report["tasks"] for name, row in task["contenders"].items()]
    lines += [f"\nLeft out: {name}, as {why}." for name, why in report["skipped"].items()]
    return "\n".join(lines) + "\n"


def versions(report: dict[str, Any]) -> list[str]:
    """What each contender ran with."""
    return [
        f"- {name}: " + ", ".join(f"{package} {number}" for package, number in told["versions"].items())
        for name, told in report["contenders"].items()
    ]


def line(task: dict[str, Any], name: str, row: dict[str, Any]) -> str:
    """One contender at one task."""
    if "failed" in row:
        return f"| {task['name']} | {name} | {row['failed']} | | | | | |".replace("\n", " ")
    ratio = task["ultrarag to"].get(name)
    beside = [f"{ratio['rate']:.2f}x", f"{ratio['memory']:.2f}x"] if ratio else ["", ""]
    beside.append(f"{ratio['least_cosine']:.5f}" if ratio and "least_cosine" in ratio else "")
    mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else ""
    cells = [task["name"], name, f"{row['tokens_per_second']:.0f}", mfu, f"{row['peak_gib']:.2f}", *beside]
    return "| " + " | ".join(cells) + " |"
