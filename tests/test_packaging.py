"""What travels in the wheel, under which name, and what the texts say to install."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tests.test_constraints import pins
from ultrarag.finetune.flags.transformers import engine_files
from ultrarag.packages import TESTED, install

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
#: what an installation has
PACKAGES = ("ultrarag", "haystack_integrations")
#: suffixes of files that are read and not written by hand
TEXTS = (".cfg", ".md", ".py", ".toml", ".yml", "")


def texts() -> list[Path]:
    """Everything that tells a user what to install: code, documentation, benchmarks, resources."""
    rooms = [ROOT / name for name in (*PACKAGES, "docs", "resources", "benchmarks", "findings")]
    inside = [path for room in rooms for path in room.rglob("*") if path.suffix in TEXTS and path.is_file()]
    return [*inside, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "setup.cfg", ROOT / "constraints.txt"]


def said(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def test_the_distribution_is_not_the_strangers() -> None:
    assert SETUP["metadata"]["name"] == "ultrarag-retrieval"
    assert "ultrarag = ultrarag.cli:main" in SETUP["options.entry_points"]["console_scripts"]
    assert any(point.value == "ultrarag.cli:main" for point in distribution("ultrarag-retrieval").entry_points)


def test_nobody_is_told_to_install_the_strangers() -> None:
    """`ultrarag` on the package index is somebody else's."""
    old = re.compile(r"pip install\b[^\n]*?[ ]['\"]?ultrarag(?![\w./-])|\bultrarag\[|dependencies = \[.ultrarag.\]")
    found = [f"{path}: {hit[0]}" for path in texts() for hit in [old.search(said(path))] if hit]
    assert not found, "\n".join(found)


def test_versions_that_are_named_are_those_that_are_tested() -> None:
    """In the table of the code, and in every command of a text."""
    tested = pins()
    for name, version in TESTED.items():
        assert tested[Requirement(name).name] == version, name
    shared = [path for path in texts() if path.parent.name not in ("peer", "findings") and path.name != "packages.py"]
    for path in shared:
        for name, version in re.findall(r"\b([a-z0-9][a-z0-9-]+)(?:\[\w+\])?==(\d[\w.]*\w)", said(path)):
            assert tested.get(name, version) == version, f"{path}: {name}=={version}"


def test_a_shell_takes_the_command() -> None:
    assert install("scipy", "ray[data]") == f"pip install scipy=={TESTED['scipy']} 'ray[data]=={TESTED['ray[data]']}'"


def test_every_file_that_is_no_code_travels_in_the_wheel() -> None:
    patterns = SETUP["options.package_data"]["ultrarag"].split()
    packed = {path for pattern in patterns for path in (ROOT / "ultrarag").glob(pattern)}
    files = (path for path in (ROOT / "ultrarag").rglob("*") if path.is_file() and path.suffix != ".py")
    beside = {path for path in files if path.parent.name != "__pycache__"}
    assert packed == beside
    assert {Path(file) for engine in ("deepspeed", "fsdp") for file in engine_files(engine).values()} < packed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel puts into site-packages, unpacked."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, tree)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "tests").mkdir()
    (tree / "tests" / "test_nothing.py").touch()  # what stays at home
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(built)!r}))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tree, capture_output=True, check=True)
    site = tmp_path_factory.mktemp("site")
    with ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(site)
    return site


def test_both_packages_travel_in_the_wheel_and_nothing_else_does(wheel: Path) -> None:
    def files(root: Path) -> set[Path]:
        found = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
        return {path.relative_to(root) for path in found if "__pycache__" not in path.parts}

    assert files(wheel) == files(ROOT)
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == set(PACKAGES)


def test_the_haystack_door_is_a_part_of_a_namespace_that_others_share(wheel: Path, tmp_path: Path) -> None:
    """Another distribution's part lies beside ours, and Haystack is named where it is missing."""
    theirs = tmp_path / "haystack_integrations" / "document_stores" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").touch()
    code = f"""
import sys
sys.path[:0] = [{str(wheel)!r}, {str(tmp_path)!r}]
import haystack_integrations.document_stores.theirs, ultrarag
try:
    import haystack_integrations.components.rankers.ultrarag
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"{install('haystack-ai')}\n")


def test_the_documented_paths_lead_to_the_packaged_files() -> None:
    """`--deepspeed resources/deepspeed/ds_stage1.json`, which scripts have, in a checkout."""
    for engine in ("deepspeed", "fsdp"):
        for file in engine_files(engine).values():
            assert (ROOT / "resources" / engine / Path(file).name).resolve() == Path(file)


def test_importing_deepspeed_prints_nothing() -> None:
    code = "from ultrarag.finetune.flags.transformers import prepare_deepspeed; prepare_deepspeed(trains=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
