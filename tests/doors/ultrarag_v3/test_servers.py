"""Our MCP servers beside UltraRAG's own: the same tools, signatures and server.yaml, by the client that it has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.doors.ultrarag_v3 import world
from tests.service.running import Running
from ultrarag.doors.ultrarag_v3 import write_servers

ASKING = Path(__file__).parent / "asking.py"
PYTHON = str(world.PEER / "python")


def asked(servers: dict[str, list[str]], calls: list[Any] | None = None, **options: Any) -> dict[str, Any]:
    words = json.dumps({"servers": servers, "calls": calls or []})
    done = subprocess.run([PYTHON, str(ASKING)], input=words, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def schema(found: Any) -> Any:
    """A schema without what the two SDKs add to it: titles, and whether other arguments are allowed."""
    if isinstance(found, dict):
        left = {"title", "additionalProperties"}
        return {name: schema(value) for name, value in found.items() if name not in left}
    return [schema(value) for value in found] if isinstance(found, list) else found


def test_a_written_server_is_ours_whatever_the_other_environment_has(tmp_path: Path, service: Running) -> None:
    """It is started as a pipeline starts it, by `python`, where another package is imported as ultrarag."""
    (tmp_path / "servers").mkdir()
    write_servers(tmp_path, service.url)
    (tmp_path / "ultrarag").mkdir()
    (tmp_path / "ultrarag" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    folder = Path("servers") / "live_retriever"
    parameters = yaml.safe_load((tmp_path / folder / "parameter.yaml").read_text())
    init = {name: parameters[name] for name in ("model_name_or_path", "backend_configs", "batch_size", "corpus_path")}
    found = asked(
        {"retriever": [PYTHON, str(folder / "src" / "live_retriever.py")]},
        [
            ("retriever_search", {"query_list": ["x"]}),
            ("retriever_init", {**init, "backend": parameters["backend"]}),
            ("retriever_search", {"query_list": ["who ruled england in 1616"], "top_k": 1}),
        ],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
    )
    early, begun, hits = found["answers"]
    assert early.startswith("ToolError: Error executing tool retriever_search: no index is named yet")
    assert (begun, hits) == (None, {"ret_psg": [["James I was the ruler of England in 1616."]]})


@pytest.mark.parametrize("name", ["retriever", "reranker"])
def test_tools_and_signatures_are_ultrarag_s(ultrarag: world.Ultrarag, name: str, tmp_path: Path) -> None:
    theirs = asked({name: [PYTHON, str(ultrarag.folder / "servers" / name / "src" / f"{name}.py")]}, cwd=tmp_path)[
        "tools"
    ]
    ours = asked({name: [sys.executable, "-m", "ultrarag.doors.ultrarag_v3", name]})["tools"]
    assert schema(ours) == schema(theirs)
    order = [[list(tool["properties"]) for tool in tools.values()] for tools in (ours, theirs)]
    assert order[0] == order[1]
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name", ["retriever", "reranker"])
def test_build_writes_what_ultrarag_s_does(ultrarag: world.Ultrarag, name: str, tmp_path: Path) -> None:
    """Of the same parameters, in a folder of the same name."""
    parameters = (ultrarag.folder / "servers" / name / "parameter.yaml").read_text()
    written = []
    theirs = [PYTHON, str(ultrarag.folder / "servers" / name / "src" / f"{name}.py")]
    for words in (theirs, [sys.executable, "-m", "ultrarag.doors.ultrarag_v3", name]):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{tmp_path.name}.py").touch()
        (tmp_path / "parameter.yaml").write_text(parameters)
        asked({name: words}, [("build", {"parameter_file": str(tmp_path / "parameter.yaml")})], cwd=tmp_path)
        written.append(yaml.safe_load((tmp_path / "server.yaml").read_text()))
        (tmp_path / "server.yaml").unlink()
    assert written[0] == written[1]
