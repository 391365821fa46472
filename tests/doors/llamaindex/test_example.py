"""The example: documents, a search, a refresh, and the same search"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.long
def test_the_example_answers_better_by_a_new_generation(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "llamaindex" / "support.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    before, refresh, after, last = done.stdout.splitlines()
    found = [re.fullmatch(r"(\w+): generation \{(\d)\} finds (\d) of 8", line) for line in (before, after)]
    (first, one, few), (then, two, many) = (match.groups() for match in found if match)
    assert (first, one, then, two) == ("before", "1", "after", "2")
    assert int(few) < int(many)
    assert refresh.startswith("refresh: swapped, nDCG@10 ")
    assert last.endswith(": basil")
