"""The house keeps its shape: imports point one way, go through a room's door, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ultrarag

PACKAGE = Path(__file__).parents[1] / "ultrarag"

#: Rooms, and files that belong to none, from the bottom up: each may import from its own line and those below it.
ORDER = [
    {"claims", "errors", "types", "lazy", "loss_arguments", "packages", "tokenizer_limits", "untrusted"},
    {"io", "maps", "products", "scores", "losses", "evaluation"},
    {"hookspecs", "transfer", "packing", "packed_attention"},
    {"adapters"},
    {"plugin_checks", "plugins"},
    {"checkpoint"},
    {"encoder/engines"},
    {"encoder"},
    {"rows"},
    {"rows/checks"},
    {"report"},
    {"retrieve/search/filters", "retrieve/ranking"},
    {"retrieve/passages"},
    {"encode"},
    {"finetune/flags"},
    {"finetune/batches"},
    {"finetune/corpus"},
    {"finetune/step"},
    {"finetune"},
    {"quantise"},
    {"retrieve/bm25"},
    {
        "retrieve/engines",
        "retrieve/engines/ivf",
        "retrieve/engines/plaid",
        "retrieve/engines/qdrant",
        "retrieve/engines/milvus",
    },
    {"retrieve/generation"},
    {"retrieve/search"},
    {"encode/ray"},
    {"retrieve/shared"},
    {"retrieve/core"},
    {"retrieve/aside", "retrieve/handles"},
    {"retrieve/swap"},
    {"retrieve/bridge"},
    {"retrieve/build", "retrieve/export", "retrieve/status"},
    {"retrieve/refresh"},
    {"retrieve/feedback"},
    {"retrieve/opening", "retrieve/exchange", "retrieve/adding", "retrieve/collection", "retrieve/signals"},
    {"retrieve/searches", "retrieve/refreshes"},
    {"retrieve/waiting"},
    {"retrieve/live"},
    {"mining"},
    {"data"},
    {"retrieve/command"},
    {"retrieve/build/__main__", "retrieve", "retrieve/mining"},
    {"testing", "demo", "service", "doors", "cli", "__init__", "__main__"},
]
#: What an adapter may use: it could be anybody's package.
FOR_ADAPTERS = {
    "adapters",
    "claims",
    "errors",
    "types",
    "loss_arguments",
    "losses",
    "scores",
    "packing",
    "hookspecs",
    "tokenizer_limits",
}


@dataclass(frozen=True)
class Import:
    """One name that a file imports, wherever in the file it stands."""

    #: file that imports, without .py, such as retrieve/live
    source: str
    line: int
    #: file or room that is named, such as retrieve/passages
    module: str
    #: empty for `import module`
    name: str


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the package, by its path without .py; a room's door is room/__init__."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(f.relative_to(PACKAGE))[:-3]: ast.parse(f.read_text(encoding="utf-8")) for f in files}


def is_room(path: str) -> bool:
    return f"{path}/__init__" in modules()


def room_of(path: str) -> str:
    """The folder of a file; empty for the files at the top."""
    return path.rpartition("/")[0]


def found(dotted: str) -> str | None:
    """The path of a module of ours, None for anybody else's."""
    if dotted.split(".")[0] != "ultrarag":
        return None
    path = "/".join(dotted.split(".")[1:])
    return path if path in modules() or is_room(path) else "__init__" if not path else None


@cache
def imports() -> list[Import]:
    """All imports of our modules, those in functions and under TYPE_CHECKING too."""
    return [item for path, tree in modules().items() for node in ast.walk(tree) for item in imports_of(path, node)]


def imports_of(path: str, node: ast.AST) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if module := found(alias.name):
                yield Import(path, node.lineno, module, "")
    elif isinstance(node, ast.ImportFrom) and node.module and (module := found(node.module)):
        for alias in node.names:
            inner = found(f"{node.module}.{alias.name}")
            exported = is_room(module) and alias.name in public(module)
            yield Import(path, node.lineno, module if exported or not inner else inner, "" if inner else alias.name)


@cache
def public(room: str) -> dict[str, str]:
    """The public names of a room, each with the file that holds it."""
    tree = modules()[f"{room}/__init__"]
    blocks = [node.body for node in tree.body if isinstance(node, ast.If)]
    names = {}
    for node in (node for block in blocks for node in block):
        if isinstance(node, ast.ImportFrom) and node.module and (path := found(node.module)):
            names.update({alias.asname or alias.name: home(path, alias.name) for alias in node.names})
    return names


def home(path: str, name: str) -> str:
    """The file in which a name that is imported from a file or a room is written."""
    if is_room(path):
        return public(path).get(name, f"{path}/__init__")
    return path


def within(path: str, room: str) -> bool:
    """Whether a file lies in a room or in a room inside it."""
    return not room or path.startswith(f"{room}/")


def level(path: str) -> int:
    """The place of a file in ORDER, by itself or by its innermost room that is named there."""
    while not any(path in names for names in ORDER):
        assert "/" in path, f"{path} has no place in ORDER"
        path = room_of(path)
    return next(number for number, names in enumerate(ORDER) if path in names)


def test_every_file_has_a_place():
    for path in modules():
        level(path.removesuffix("/__init__"))


def test_no_circles():
    graph: dict[str, set[str]] = {path: set() for path in modules()}
    for item in imports():
        if not item.source.endswith("__init__"):
            graph[item.source].add(home(item.module, item.name))
    for path, targets in graph.items():
        targets.discard(path)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")


def test_imports_point_down():
    wrong = [
        f"{item.source}.py:{item.line} imports {item.module}, which is above it"
        for item in imports()
        if not item.source.endswith("__init__")
        and level(home(item.module, item.name).removesuffix("/__init__")) > level(item.source)
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_entered_by_the_door():
    wrong = [
        f"{item.source}.py:{item.line} takes {item.name or 'the module'} from inside {room_of(item.module)}: "
        "import a public name of the room"
        for item in imports()
        if not is_room(item.module) and not within(item.source, room_of(item.module))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_public_names_are_taken():
    wrong = [
        f"{item.source}.py:{item.line} takes {item.name} from {item.module}"
        for item in imports()
        if (
            item.name.startswith("_")
            and not item.name.startswith("__")
            and room_of(item.source) != room_of(home(item.module, item.name))
        )
        or (is_room(item.module) and item.name and item.name not in public(item.module) | defined(item.module))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "haystack_integrations").rglob("*.py")), ids=lambda p: p.name)
def test_what_lies_in_a_framework_s_namespace_enters_by_the_door(path):
    """As anybody's package would: public names of rooms, and of the files that belong to none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = [item for node in ast.walk(tree) for item in imports_of(path.name, node)]
    wrong = [item for item in taken if not is_room(item.module) and room_of(item.module)]
    wrong += [item for item in taken if is_room(item.module) and item.name not in public(item.module)]
    wrong += [item for item in taken if item.module == "__init__" and item.name not in ultrarag.__all__]
    assert not wrong


def defined(room: str) -> dict[str, str]:
    """What a room's door itself defines: functions, classes, constants."""
    tree = modules()[f"{room}/__init__"] if room != "__init__" else modules()["__init__"]
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    return dict.fromkeys(names, "")


@pytest.mark.parametrize(
    "room", sorted(path.removesuffix("/__init__") for path in modules() if path.endswith("/__init__"))
)
def test_a_room_says_what_it_is(room):
    assert ast.get_docstring(modules()[f"{room}/__init__"])


def test_no_public_name_is_a_modules_name():
    """`from room import name` gives the module of that name once anybody has imported it."""
    rooms = [path.removesuffix("/__init__") for path in modules() if path.endswith("/__init__")]
    both = [f"{room}: {name}" for room in rooms for name in public(room) if f"{room}/{name}" in modules()]
    assert both == ["retrieve: mine"], both  # that module puts the function into its place


def test_mine_is_the_function_after_its_module_was_imported():
    code = "import ultrarag.retrieve.mine; from ultrarag.retrieve import mine; print(mine.__module__, callable(mine))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ultrarag.mining.miner", "True"]


@pytest.mark.parametrize(
    "path", sorted(p for p in modules() if p.startswith("adapters/") and not p.endswith("/__init__"))
)
def test_adapters_use_the_contract_alone(path):
    used = {item.module.split("/")[0] for item in imports() if item.source == path}
    assert used <= FOR_ADAPTERS


@pytest.mark.parametrize(
    "code",
    [
        "import ultrarag",
        "import ultrarag; ultrarag.Passage; ultrarag.hookimpl; ultrarag.UltraragError",
        "import ultrarag.finetune",
        "import ultrarag.retrieve",
        "import ultrarag.data",
        "import ultrarag.service",
        "import ultrarag.doors.ultrarag_v3.serving",
        "from ultrarag.cli import main\nassert main(['data', '--help']) == 0",
        "from ultrarag.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from ultrarag.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass",
        "from ultrarag.plugins import registry; registry().plugins()",
    ],
)
def test_no_deep_learning_library_is_imported(code):
    heavy = "('torch', 'transformers', 'sentence_transformers', 'datasets', 'sklearn')"
    check = f"{code}\nimport sys\nprint('heavy:', [name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_an_embedded_index_needs_no_client_of_a_server():
    """It takes a second to import, which is a sixth of a search from the shell."""
    clients = "('qdrant_client', 'pymilvus', 'httpx', 'grpc')"
    code = (
        "import ultrarag.retrieve.live, ultrarag.retrieve.command.commands, ultrarag.retrieve.engines.qdrant.embedded"
    )
    check = f"{code}\nimport sys\nprint([name for name in {clients} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
