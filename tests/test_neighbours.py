"""Another distribution with our import name in the same folder: refused where it has written over our files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ultrarag.packages import refuse_shared_files

PACKAGE = Path(__file__).parents[1] / "ultrarag"


def record(site: Path, distribution: str, *files: str) -> None:
    folder = site / f"{distribution}.dist-info"
    folder.mkdir(parents=True)
    (folder / "RECORD").write_text("".join(f"{file},sha256=abc,12\n" for file in files), encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where this library is installed, by its record."""
    record(tmp_path, "ultrarag_retrieval-0.1.0", "ultrarag/__init__.py", "ultrarag/cli.py", "ultrarag/lazy.py")
    return tmp_path


@pytest.mark.parametrize("name", ["ultrarag-0.3.0.2", "UltraRAG-0.3.0"])
def test_files_that_both_have_written_are_refused(site: Path, name: str) -> None:
    record(site, name, "../../../bin/ultrarag", "ultrarag/__init__.py", "ultrarag/client.py", "ultrarag/cli.py")
    with pytest.raises(ImportError) as caught:
        refuse_shared_files(str(site))
    for word in ("'ultrarag-retrieval'", "'ultrarag'", "(ultrarag/__init__.py, ultrarag/cli.py)", "pip uninstall -y"):
        assert word in str(caught.value)


def test_distributions_without_a_file_in_common_are_fine(site: Path) -> None:
    record(site, "ultrarag-1.0.0", "ultrarag.py", "../../../bin/ultrarag")
    record(site, "ultrarag_something-1.0", "ultrarag/__init__.py")
    (site / "ultrarag-0.2.dist-info").mkdir()  # what an interrupted uninstall leaves
    refuse_shared_files(str(site))


@pytest.mark.parametrize("first", ["import ultrarag", "import ultrarag.finetune"])
def test_import_says_so_whoever_was_installed_last(site: Path, first: str) -> None:
    """Their `__init__` hides ours in the second case: the rooms tell."""
    record(site, "ultrarag-0.3.0.2", "ultrarag/__init__.py", "ultrarag/cli.py")
    shutil.copytree(PACKAGE, site / "ultrarag", ignore=shutil.ignore_patterns("__pycache__", "retrieve"))
    if first != "import ultrarag":
        (site / "ultrarag" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", first],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "ImportError: the distributions 'ultrarag-retrieval' (this library) and 'ultrarag'" in done.stderr
