"""The README's commands and code, run as written, on tiny models and rows."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.finetune.test_run import ROWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.S)


def small(text: str, tiny_m3: str) -> str:
    """The same commands on a model and lengths that take seconds."""
    return (
        text.replace("BAAI/bge-m3", tiny_m3)
        .replace("_max_len 256", "_max_len 24")
        .replace("_max_len 64", "_max_len 16")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_m3):
    """A working directory with the files that the README names."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("train.jsonl", "held_out.jsonl"):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    new = [{**row, "query": f"new: {row['query']}"} for row in ROWS]  # a refresh refuses what was trained on
    (path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    return path


def environment(folder: Path) -> dict[str, str]:
    first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": first, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}


def run(words, folder):
    done = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.parametrize(("language", "block"), BLOCKS, ids=lambda text: text.strip().splitlines()[0][:40])
def test_readme_block(language, block, folder, tiny_m3):
    """Blocks run in the order of the page: later ones use the checkpoints of earlier ones."""
    if language == "bash" and block.startswith("make "):
        targets = re.findall(r"^make (\w+)", block, flags=re.M)
        found = run(["make", "-n", "-C", str(ROOT), *targets], folder)
        assert "ultrarag.demo" in found.stdout
        return
    words = ["bash", "-ec"] if language == "bash" else [sys.executable, "-c"]
    run([*words, small(block, tiny_m3)], folder)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_every_relative_path_that_a_page_names_exists(page):
    for name in re.findall(r"`((?:benchmarks|docs|resources|tests)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
