"""A refresh under a running pipeline: its answers change, and neither it nor its servers are started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doors.ultrarag_v3 import house, swap, world

KEPT = Path(__file__).parents[3] / "docs" / "ultrarag-v3-swap.txt"


MEANT = house.ROOMS["quillon"]


def answers(lines: list[str]) -> list[tuple[str, bool]]:
    """Of each search for the question: the generation, and whether it found what the house means."""
    told = [line.split("  service   ")[1] for line in lines if "  service   " in line and house.QUESTION in line]
    return [(line.split(" (")[0], line.endswith(MEANT)) for line in told]


SWAPPED = [("generation 1", False)] * 2 + [("generation 2", True)] * 2


@pytest.mark.long
def test_the_pipeline_s_answers_change(tmp_path: Path) -> None:
    if not world.CHECKOUT.is_dir():
        pytest.skip("UltraRAG's repository could not be cloned (tests/doors/run.py says how to name a clone)")
    log = swap.Log()
    found = swap.run(tmp_path, log)
    assert answers(log.lines) == SWAPPED
    assert [text in MEANT for text in found["ret_psg"][0]] == [right for _, right in SWAPPED]
    assert found["pred_ls"][0] in MEANT


def test_the_committed_log_says_so() -> None:
    assert answers(KEPT.read_text(encoding="utf-8").splitlines()) == SWAPPED
