"""The page of doors says what the committed runs gave."""

import configparser
import importlib
import sys
from pathlib import Path

import pytest

from tests.doors import run

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_results():
    assert run.PAGE.read_text(encoding="utf-8") == run.page(), "python tests/doors/run.py writes it anew"


def test_every_door_has_a_result_without_failures():
    rows = run.table()
    for name in run.doors():
        assert f"| {name} |" in rows, f"make doors ARGS={name}, and commit its result.json"
    assert all(line.split(" | ")[-2] == "0" for line in rows.splitlines()[2:]), rows


def test_every_door_s_versions_are_pinned():
    for name in run.doors():
        lines = (run.HERE / name / "requirements.txt").read_text(encoding="utf-8").split()
        assert lines, name
        assert all("==" in line for line in lines), name


def test_frameworks_are_extras_of_their_names():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    rooms = {folder.name for folder in (ROOT / "ultrarag" / "doors").iterdir() if (folder / "__init__.py").is_file()}
    assert rooms <= set(config["options.extras_require"])


@pytest.mark.parametrize(
    ("framework", "door", "words"),
    [
        ("llama_index", "ultrarag.doors.llamaindex", "needs LlamaIndex: pip install llama-index-core==0"),
        ("langchain_core", "ultrarag.doors.langchain", "needs langchain-core: pip install langchain-core==1"),
        (
            "haystack",
            "haystack_integrations.document_stores.ultrarag",
            "not installed here: pip install haystack-ai==3",
        ),
        (
            "haystack",
            "haystack_integrations.components.rankers.ultrarag",
            "not installed here: pip install haystack-ai==3",
        ),
    ],
)
def test_a_door_without_its_framework_names_the_command(
    monkeypatch: pytest.MonkeyPatch, framework: str, door: str, words: str
):
    monkeypatch.setitem(sys.modules, framework, None)
    for name in [name for name in sys.modules if name.startswith(("haystack_integrations", door))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=words):
        importlib.import_module(door)
