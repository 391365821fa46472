"""Programs of tests: what they write is read while they run."""

from __future__ import annotations

from tests import forked


def test_ranks_may_write_more_than_a_pipe_holds():
    """The second waits for nobody; the first ends after it."""
    done = forked.torchrun(["-c", "import sys; print('x' * 300_000); print('y' * 300_000, file=sys.stderr)"])
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 600_002, 600_002)
