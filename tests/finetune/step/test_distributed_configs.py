"""DeepSpeed and FSDP2 between two CPU processes: the vectors, the metrics and the resume of one process.

FSDP2 runs always; DeepSpeed's stages, plain steps and gradient accumulation with ULTRARAG_LONG_TESTS=1, which takes
some minutes. A short run under DeepSpeed is in tests/finetune/test_run.py: UltraRAG's documented command.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import forked
from tests.finetune.test_run import ROWS, assert_same_weights
from ultrarag import Encoder
from ultrarag.checkpoint.manifest import read_manifest
from ultrarag.checkpoint.publishing import largest_difference
from ultrarag.errors import UsageError
from ultrarag.finetune import finetune
from ultrarag.finetune.flags.transformers import engine_files

LONG = os.environ.get("ULTRARAG_LONG_TESTS") == "1"
#: Largest difference of any component of the final vectors after four steps of AdamW at 1e-3; they move by 1e-2.
TOLERANCE = 2e-6
FSDP = ["--fsdp", "--fsdp_config", "fsdp2"]
#: 8 + 8 + 3: the last batch leaves two queries for one rank and one for the other
DATA = ROWS[:19]
SHARED = {
    "train_group_size": 2,
    "query_max_len": 16,
    "passage_max_len": 24,
    "learning_rate": 1e-3,
    "unified_finetuning": True,
    "use_self_distill": True,
    "max_steps": 4,
}


def zero(stage: int) -> list[str]:
    return ["--deepspeed", f"stage{stage}"]


long = pytest.mark.skipif(not LONG, reason="set ULTRARAG_LONG_TESTS=1 for the tests that take minutes")
ENGINES = [
    pytest.param(FSDP, "ZeRO stage none, shards ['full_tensor']", id="fsdp2"),
    pytest.param(zero(3), "ZeRO stage 3, shards ['ds_id']", id="zero3", marks=long),
    *(
        pytest.param(zero(stage), f"ZeRO stage {stage}, shards []", id=f"zero{stage}", marks=long)
        for stage in (0, 1, 2)
    ),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    return folder


@pytest.fixture(scope="module")
def one(work, tiny_m3) -> Path:
    """What one process makes of the same steps."""
    return alone(work, tiny_m3, "one", eval_data=str(work / "train.jsonl"), eval_steps=2)


def alone(work: Path, model: str, name: str, **more) -> Path:
    options = {**SHARED, "per_device_train_batch_size": 8, "cache_path": str(work / "cache"), **more}
    finetune(model, str(work / "train.jsonl"), work / name, adapter="bgem3", **options)
    return work / name


def flags(work: Path, model: str, name: str, *more: object) -> list[str]:
    settings = {
        "model_name_or_path": model,
        "train_data": work / "train.jsonl",
        "cache_path": work / "cache",
        "output_dir": work / name,
        "per_device_train_batch_size": 4,
        "negatives_cross_device": True,
        **SHARED,
    }
    settings |= dict(zip(map(str, more[::2]), more[1::2], strict=True))
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def together(work: Path, runs: list[list[str]]) -> str:
    """Two processes do the runs in turn; what they said on stderr."""
    file = work / "runs.json"
    file.write_text(json.dumps(runs))
    done = forked.torchrun(["-m", "tests.finetune.step.engine_worker", str(file)])
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def difference(left: Path, right: Path) -> float:
    texts = [row["query"] for row in ROWS] + [row["pos"][0] for row in ROWS]
    mine, theirs = (Encoder.load(path, device="cpu").encode(texts, progress=False) for path in (left, right))
    return max(largest_difference(mine, theirs).values())


def metrics(folder: Path) -> dict[str, float]:
    found = read_manifest(folder).training.metrics["after"]
    return {name: value for name, value in found.items() if isinstance(value, float)}


@pytest.mark.parametrize(("engine", "layout"), ENGINES)
def test_engine_gives_the_vectors_of_one_process_and_resumes(engine, layout, work, one, tiny_m3) -> None:
    """GradCache with chunks of two texts, cross-device negatives, and a rank with fewer chunks than the other."""
    name = "".join(filter(str.isalnum, layout))
    cached = ["sub_batch_size", 2, "save_steps", 2, "eval_data", work / "train.jsonl", "eval_steps", 2]
    again = [*cached, "resume_from_checkpoint", work / name / "checkpoint-2"]
    runs = [flags(work, tiny_m3, name, *cached) + engine, flags(work, tiny_m3, f"{name}-resumed", *again) + engine]
    printed = together(work, runs)
    assert printed.count(f"layout: {layout}") == 2
    assert difference(one, work / name) < TOLERANCE
    assert metrics(work / name) == pytest.approx(metrics(one))
    assert_same_weights(work / name, work / f"{name}-resumed")


@long
@pytest.mark.parametrize(("engine", "layout"), ENGINES)
def test_engine_with_plain_and_accumulated_steps(engine, layout, work, one, tiny_m3) -> None:
    name = "".join(filter(str.isalnum, layout)) + "-plain"
    accumulated = ["gradient_accumulation_steps", 2, "max_steps", 2]
    runs = [
        flags(work, tiny_m3, name, "gradient_checkpointing", True),
        flags(work, tiny_m3, f"{name}-more", *accumulated),
        flags(work, tiny_m3, f"{name}-more-cached", *accumulated, "sub_batch_size", 2),
    ]
    together(work, [run + engine for run in runs])
    more = alone(work, tiny_m3, f"{name}-one", gradient_accumulation_steps=2, max_steps=2)
    assert difference(alone(work, tiny_m3, f"{name}-four"), work / name) < TOLERANCE
    assert difference(more, work / f"{name}-more") < TOLERANCE
    assert difference(more, work / f"{name}-more-cached") < TOLERANCE


@long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_keeps_the_weights_that_the_optimizer_steps_on(stage, work, tiny_m3) -> None:
    """A step of 1e-5 is less than bfloat16 can tell: what is saved is DeepSpeed's float32 copy."""
    name = f"half{stage}"
    more = ["use_cpu", True, "bf16", True, "learning_rate", 1e-5]
    together(work, [flags(work, tiny_m3, name, *more) + zero(stage)])
    weight = Encoder.load(work / name, device="cpu").model.colbert_linear.weight
    assert (weight != weight.bfloat16().float()).float().mean() > 0.9


def test_fsdp_of_version_1_is_refused(tiny_m3, tmp_path) -> None:
    with pytest.raises(UsageError, match="version 1 in fsdp_config is not supported"):
        finetune(tiny_m3, DATA, tmp_path, adapter="bgem3", fsdp=True, fsdp_config={"version": 1})


def test_lora_with_an_engine_is_refused(tiny_m3, tmp_path) -> None:
    with pytest.raises(UsageError, match="--use_lora does not work with --fsdp or --deepspeed"):
        finetune(tiny_m3, DATA, tmp_path, adapter="bgem3", use_lora=True, fsdp=True)


def test_fsdp_in_one_process_is_refused(tiny_m3, tmp_path) -> None:
    with pytest.raises(UsageError, match="--fsdp shards the weights over processes and there is one"):
        finetune(tiny_m3, DATA, tmp_path, adapter="bgem3", fsdp=True)


def test_every_engine_file_is_in_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()
    for flag, engine in (("--deepspeed", "deepspeed"), ("--fsdp --fsdp_config", "fsdp")):
        for name in engine_files(engine):
            assert f"| `{flag} {name}` |" in page
