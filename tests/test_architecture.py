"""docs/architecture.md is true: its rooms are those of the package, and every file and name in it is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ultrarag"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: `finetune/run.py` `Run.read`: a file below ultrarag/, perhaps with a name that is written there
PLACES = sorted(set(re.findall(r"`((?!tests/)[\w/]+\.py)`(?: `([\w.]+)`)?", PAGE)))


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def summary(room: Path) -> str:
    """The first paragraph of a room's docstring, on one line."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def names_in(tree: ast.Module) -> set[str]:
    """What a file defines: functions, classes, methods and fields as Class.name, constants."""
    found = set()
    for node in tree.body:
        found |= defined(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for item in node.body for name in defined(item)}
    return found


def defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_room_is_described_in_its_own_words():
    rooms = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.*) \|$", section("Rooms"), flags=re.MULTILINE))
    assert rows == {str(room.relative_to(PACKAGE)): summary(room) for room in rooms}


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_place_is_there(file, name):
    path = PACKAGE / file
    assert path.is_file(), f"docs/architecture.md names {file}"
    assert not name or name in names_in(ast.parse(path.read_text(encoding="utf-8"))), f"{file} has no {name}"


@pytest.mark.parametrize("journey", ["A training row", "A passage", "A checkpoint"])
def test_a_journey_goes_from_file_to_file(journey):
    hops = re.findall(
        r"^\d+\. `([\w/]+\.py)`", PAGE.split(f"\n### {journey}", 1)[1].split("\n#", 1)[0], flags=re.MULTILINE
    )
    assert len(hops) >= 5
    assert len(set(hops)) <= 25


def test_the_commonest_changes_have_a_place():
    rows = re.findall(r"^\| [^|`]+ \| `[\w/]+\.(?:py|md)`.* \|$", section("To change"), flags=re.MULTILINE)
    assert len(rows) >= 20
