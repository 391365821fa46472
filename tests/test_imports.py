"""Imports point one way, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ultrarag"

#: Layers from the bottom up: a module may import its own layer and those below it.
LAYERS = [
    {"errors", "types", "compress", "loss_arguments", "files", "vector_files", "progress", "tables", "__init__"},
    {"scores", "losses", "ir", "beir"},
    {"hookspecs", "packing", "packed_attention", "transfer"},
    {"adapters"},
    {"plugin_checks", "plugins"},
    {
        "checkpoint",
        "fingerprint",
        "ahead",
        "cuts",
        "casts",
        "parallel",
        "tokenize",
        "loading",
        "pairs",
        "encoder",
        "publish",
        "model_card",
    },
    {"lineage", "report"},
    {"finetune"},
    {"retrieve"},
    {"data"},
    {"testing", "demo", "cli"},
]
#: What an adapter may use: it could be anybody's package.
FOR_ADAPTERS = {"adapters", "errors", "types", "loss_arguments", "losses", "scores", "packing", "hookspecs"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The first name below `ultrarag`: a module, or a sub-package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if part in names)


def imported(path: Path) -> set[str]:
    """The parts of ultrarag that a module imports when it is imported itself (not inside functions)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        for item in [node] if not isinstance(node, ast.Try) else node.body:
            if isinstance(item, ast.ImportFrom) and item.module and item.module.split(".")[0] == "ultrarag":
                names = item.module.split(".")[1:2] or [alias.name for alias in item.names]
                found.update(names)
            elif isinstance(item, ast.Import):
                found.update(a.name.split(".")[1] for a in item.names if a.name.startswith("ultrarag."))
    return {name for name in found if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}


def test_every_module_has_a_layer():
    assert {part_of(path) for path in modules()} <= set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = layer_of(part_of(path))
    above = {name for name in imported(path) if layer_of(name) > own}
    assert not above, f"{path.name} imports {above} from above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "adapters").glob("*.py")), ids=lambda path: path.name)
def test_adapters_use_the_contract_alone(path):
    assert imported(path) <= FOR_ADAPTERS


@pytest.mark.parametrize(
    "code",
    [
        "import ultrarag",
        "import ultrarag; ultrarag.Passage; ultrarag.hookimpl; ultrarag.UltraragError",
        "import ultrarag.finetune",
        "import ultrarag.retrieve",
        "import ultrarag.data",
        "from ultrarag.cli import main\nassert main(['data', '--help']) == 0",
        "from ultrarag.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from ultrarag.plugins import registry; registry().plugins()",
    ],
)
def test_no_deep_learning_library_is_imported(code):
    heavy = "('torch', 'transformers', 'sentence_transformers', 'datasets', 'sklearn')"
    check = f"{code}\nimport sys\nprint('heavy:', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"
