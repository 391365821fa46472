"""The cross-device loss and gradient against the true ones: two gloo processes, with and without GradCache."""

from __future__ import annotations

import json

import pytest

from tests import forked, golden

PRESENT = golden.VISIBLE_SET.present()
CASES = golden.read(golden.VISIBLE_SET.data / "ddp.json")["cases"] if PRESENT else []


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Every case's loss and gradient norms, measured by two processes once."""
    path = tmp_path_factory.mktemp("ddp") / "results.json"
    done = forked.torchrun(["-m", "tests.ddp_worker", str(path)])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.skipif(not PRESENT, reason=golden.WHY_SKIPPED)
@pytest.mark.parametrize("way", ["two_ranks", "gradcache"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_gradient_is_that_of_one_process_with_the_whole_batch(measured, case, way):
    loss, norms = measured[case["name"]][way]
    expected_loss, expected_norms = measured[case["name"]]["one_process"]
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert norms == pytest.approx(expected_norms, rel=1e-7)


@pytest.mark.skipif(not PRESENT, reason=golden.WHY_SKIPPED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_objective_of_the_peer(measured, case):
    """Where the peer shares what we share (all but unified + cross), its true objective and gradient are ours."""
    if case["config"]["unified"]:
        pytest.skip("the peer shares only the dense head across devices, and lets padding take part in MaxSim")
    loss, norms = measured[case["name"]]["two_ranks"]
    assert loss == pytest.approx(case["f64"]["true_objective"], rel=1e-7)
    assert norms == pytest.approx(case["f64"]["true_grad_norm"], rel=1e-7)
