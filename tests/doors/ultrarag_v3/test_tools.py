"""Our MCP servers' tools, asked in memory: searches, writing, reranking, errors in words, server.yaml."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

from tests.doors.ultrarag_v3 import world
from tests.service.running import Running
from ultrarag.cli import main
from ultrarag.doors.ultrarag_v3 import create_server, write_servers
from ultrarag.doors.ultrarag_v3.backend import Backend
from ultrarag.doors.ultrarag_v3.folders import FOLDERS
from ultrarag.errors import UsageError
from ultrarag.retrieve import LiveIndex

QUESTION, MOON = "when was the last time anyone was on the moon", world.CORPUS[0]["contents"]
KING = "James I was the ruler of England in 1616."


def asked(server: str, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """What each call gives: the JSON of its result, None without any, or the text of its error."""
    from mcp.client import Client

    async def run() -> list[Any]:
        async with Client(create_server(server)) as client:
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    found = anyio.run(run)
    texts = [result.content[0].text if result.content else "null" for result in found]
    return [text if result.is_error else json.loads(text) for result, text in zip(found, texts, strict=True)]


def init(service: Running, **changes: Any) -> tuple[str, dict[str, Any]]:
    configs = {"ultrarag": {"url": service.url, **changes.pop("config", {})}}
    given = {"model_name_or_path": "default", "backend": "ultrarag", "batch_size": 1, "corpus_path": "none.jsonl"}
    return "retriever_init", {**given, "backend_configs": configs, **changes}


def test_searches(service: Running) -> None:
    queries = {"query_list": [QUESTION, "", "who ruled england in 1616"], "top_k": 1}
    _, one, words, deployed = asked(
        "retriever",
        init(service),
        ("retriever_search", queries),
        ("bm25_search", {"query_list": ["yeasts"], "top_k": 5}),
        ("retriever_deploy_search", {**queries, "retriever_url": service.url.removeprefix("http://") + "/any"}),
    )
    assert one == {"ret_psg": [[MOON], [], [KING]]} == deployed
    assert words == {"ret_psg": [["Sourdough rises by the yeasts that live in flour."]]}


def test_many_queries_go_in_several_requests(service: Running) -> None:
    batches = [[QUESTION] * 70, [], ["who ruled england in 1616"]]
    _, found = asked("retriever", init(service), ("retriever_batch_search", {"batch_query_list": batches, "top_k": 1}))
    assert found == {"ret_psg_ls": [[[MOON]] * 70, [], [[KING]]]}


def test_an_instruction_stands_before_each_query(service: Running) -> None:
    words = {"query_list": ["yeasts"], "top_k": 1}
    _, plain, led = asked(
        "retriever",
        init(service, config={"weights": {"bm25": 1}}),
        ("retriever_search", words),
        ("retriever_search", {**words, "query_instruction": "danube danube black sea "}),
    )
    assert plain["ret_psg"][0][0].startswith("Sourdough")
    assert led["ret_psg"][0][0].startswith("The Danube")


@pytest.fixture
def own(tmp_path: Path, encoder) -> Iterator[Running]:
    """A service over an index of its own, with a token."""
    live = LiveIndex.create(tmp_path / "own", encoder, backend="numpy")
    running = Running(live, weights={"dense": 1.0}, token="0123456789abcdef-token")
    yield running
    running.stop()


def test_a_corpus_is_added(own: Running, tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setenv("KB_TOKEN", own.app.state.service.settings.token)
    corpus = world.write_corpus(tmp_path / "corpus.jsonl")
    config = {"token_variable": "KB_TOKEN"}
    *_, found = asked(
        "retriever",
        init(own, config=config, corpus_path=str(corpus)),
        ("retriever_embed", {"embedding_path": "x.npy"}),
        ("bm25_index", {}),
        ("retriever_search", {"query_list": [QUESTION], "top_k": 2}),
    )
    assert found == {"ret_psg": [[row["contents"] for row in world.CORPUS[:2]]]}
    assert [passage.id for passage in own.live.passages(ids=["moon", "moon#2"])] == ["moon", "moon#2"]
    said = capfd.readouterr().err
    assert f"{corpus}: 2 rows repeat an id, added as 'moon#2' and so on" in said
    assert "retriever_embed: nothing to do" in said


def test_collections(own: Running, tmp_path: Path, monkeypatch) -> None:
    """Each has ids of its own; one that is written anew loses what its corpus no longer holds, and no other does."""
    monkeypatch.setenv("ULTRARAG_TOKEN", own.app.state.service.settings.token)
    files = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for file, texts in zip(files, (["a cat", "a dog"], ["a rose"], ["a cat"]), strict=True):
        file.write_text("".join(json.dumps({"id": n, "contents": text}) + "\n" for n, text in enumerate(texts)))

    def index(file: Path, name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        return "retriever_index", {"embedding_path": "", "corpus_path": str(file), "collection_name": name, **more}

    query = {"query_list": ["animal"], "top_k": 5}
    *_, before, _, after, memory = asked(
        "retriever",
        init(own),
        index(files[0], "animals"),
        index(files[1], "user_7"),
        ("retriever_search", {**query, "collection_name": "animals"}),
        index(files[2], "animals", overwrite=True),
        ("retriever_search", {**query, "collection_name": "animals"}),
        ("retriever_project_memory_search", {**query, "current_user_id": "7"}),
    )
    assert sorted(before["ret_psg"][0]) == ["a cat", "a dog"]
    assert after == {"ret_psg": [["a cat"]]}
    assert memory == {"project_memory_content": [["a rose"]]}
    assert [passage.id for passage in own.live.passages()] == ["animals/0", "user_7/0"]


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ({}, "backend_configs is empty, and says nothing of 'ultrarag': write backend_configs: {ultrarag: {url: "),
        ({"openai": {}, "infinity": {}}, "backend_configs has openai, infinity, and says nothing of 'ultrarag'"),
    ],
)
def test_a_backend_without_its_configs_is_told_what_to_write(configs: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as told:
        Backend.of("ultrarag", configs)
    assert str(told.value).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "openai"}, "backend is 'openai', and this server has 'ultrarag' alone: write backend: ultrarag"),
        ({"config": {"urls": "x"}}, "backend_configs.ultrarag.urls: Extra inputs are not permitted"),
        ({"config": {"url": "kb"}}, "backend_configs.ultrarag.url: String should match"),
        ({"config": {"url": "http://127.0.0.1:9"}}, "Connection refused"),
        ({"model_name_or_path": "openbmb/MiniCPM-Embedding-Light"}, "the model is the service's own. Write default"),
        ({"model_name_or_path": "0123456789abcdef"}, "model_name_or_path names 0123456789ab, and"),
        ({"is_multimodal": True}, "a live index holds texts"),
    ],
)
def test_what_an_init_cannot_use(service: Running, changes: dict[str, Any], said: str) -> None:
    [found] = asked("retriever", init(service, **changes))
    assert any(words in found for words in said.split("|")), found


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("retriever_search", {"query_list": ["x"], "top_k": 0}), "/v1/search_many answered 400: 'k': "),
        (("retriever_websearch", {"query_list": ["x"]}), "a live index does not search the web"),
        (("retriever_batch_websearch", {"batch_query_list": []}), "a live index does not search the web"),
        (("bm25_index", {}), "none.jsonl"),
        (("bm25_index", {"overwrite": True}), "overwrite is true without a collection_name"),
        (
            ("retriever_deploy_search", {"retriever_url": "127.0.0.1:9", "query_list": ["x"]}),
            "http://127.0.0.1:9/search cannot be reached",
        ),
    ],
)
def test_errors_reach_the_pipeline_in_words(service: Running, call: tuple[str, dict[str, Any]], said: str) -> None:
    _, found = asked("retriever", init(service), call)
    assert said in found


def test_who_did_not_init_is_told(service: Running) -> None:
    assert "must call retriever_init first" in asked("retriever", ("bm25_search", {"query_list": ["x"]}))[0]
    pairs = {"query_list": ["x"], "passages_list": [["y"]]}
    assert "must call reranker_init first" in asked("reranker", ("reranker_rerank", pairs))[0]


def test_a_wrong_token_is_told(own: Running, monkeypatch) -> None:
    monkeypatch.setenv("ULTRARAG_TOKEN", "another-token-0123456789")
    assert "(the token is read from the variable ULTRARAG_TOKEN)" in asked("retriever", init(own))[0]


def test_a_fingerprint_holds_until_a_swap(own: Running, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ULTRARAG_TOKEN", own.app.state.service.settings.token)
    pinned = init(own, model_name_or_path=own.live.fingerprint[:16])
    _, found = asked("retriever", pinned, ("retriever_search", {"query_list": ["x"]}))
    assert found == {"ret_psg": [[]]}


def test_reranking(service: Running) -> None:
    texts = [row["contents"] for row in world.CORPUS]
    configs = {"ultrarag": {"url": service.url}}
    begin = {"backend_configs": configs, "batch_size": 1, "backend": "ultrarag"}
    pairs = {"query_list": [QUESTION, "x"], "passages_list": [texts, []], "top_k": 2}
    _, found, uneven = asked(
        "reranker",
        ("reranker_init", {**begin, "model_name_or_path": service.live.fingerprint}),
        ("reranker_rerank", pairs),
        ("reranker_rerank", {**pairs, "query_list": ["x"]}),
    )
    assert found["rerank_psg"][0][0] == MOON
    assert (len(found["rerank_psg"][0]), found["rerank_psg"][1]) == (2, [])
    assert "query_list has 1 queries and passages_list 2 lists" in uneven
    _, other = asked(
        "reranker",
        ("reranker_init", {**begin, "model_name_or_path": "0123456789abcdef"}),
        ("reranker_rerank", pairs),
    )
    assert "answered 409: the request names the model 0123456789ab" in other


def test_folders_for_a_checkout(tmp_path: Path, capsys) -> None:
    (tmp_path / "servers").mkdir()
    assert main(["doors", "ultrarag_v3", str(tmp_path), "--url", "http://kb:1"]) == 0
    said = capsys.readouterr()
    assert yaml.safe_load(said.out) == {
        "servers": {"retriever": "servers/live_retriever", "reranker": "servers/live_reranker"}
    }
    parameters = tmp_path / "servers" / "live_retriever" / "parameter.yaml"
    assert yaml.safe_load(parameters.read_text())["backend_configs"]["ultrarag"]["url"] == "http://kb:1"
    parameters.write_text("top_k: 7\n")
    assert main(["doors", "ultrarag_v3", str(tmp_path)]) == 0
    assert "its parameter.yaml is kept" in capsys.readouterr().err
    assert parameters.read_text() == "top_k: 7\n"


def test_folders_are_written_into_a_checkout_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no checkout of UltraRAG: it has no folder servers"):
        write_servers(tmp_path)
    (tmp_path / "servers").mkdir()
    with pytest.raises(UsageError, match="'kb:1' is no address"):
        write_servers(tmp_path, "kb:1")


def test_an_environment_that_is_gone_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "servers").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/gone/bin/python")
        write_servers(tmp_path)
    program = tmp_path / "servers" / "live_reranker" / "src" / "live_reranker.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("/gone/bin/python is gone: write this server anew with `ultrarag doors ultrarag_v3")


def test_servers_need_the_sdk(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "servers").mkdir()
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    with pytest.raises(UsageError, match="pip install mcp=="):
        create_server("retriever")
    monkeypatch.setattr("ultrarag.doors.ultrarag_v3.folders.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install mcp=="):
        write_servers(tmp_path)


def test_the_page_says_what_is_written(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "doors.md").read_text(encoding="utf-8")
    blocks = [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page.split("## UltraRAG v3")[1], re.S)
    ]
    servers = {name: f"servers/{folder}" for name, folder in FOLDERS.items()}
    assert {"servers": servers} in blocks
    configs = [block["retriever"]["backend_configs"]["openai"] for block in blocks if "retriever" in block]
    assert configs == [{"base_url": "http://127.0.0.1:8080/v1", "model_name": "8a41...", "api_key": "any"}]


def test_build_writes_what_a_pipeline_reads(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    write_servers(tmp_path)
    folder = tmp_path / "servers" / "live_retriever"
    assert asked("retriever", ("build", {"parameter_file": str(folder / "parameter.yaml")})) == [None]
    found = yaml.safe_load((folder / "server.yaml").read_text())
    assert (found["path"], found["prompts"]) == (str(folder / "src" / "live_retriever.py"), {})
    assert found["tools"]["retriever_search"] == {
        "input": {
            "query_list": "q_ls",
            "top_k": "$top_k",
            "query_instruction": "$query_instruction",
            "collection_name": "$collection_name",
        },
        "output": ["ret_psg"],
    }
    assert "output" not in found["tools"]["retriever_init"]
    given = {value for tool in found["tools"].values() for value in tool["input"].values() if value[0] != "$"}
    assert given == {"q_ls", "batch_query_list", "current_user_id"}, "everything else is in parameter.yaml"


def test_a_folder_that_was_renamed_is_told(tmp_path: Path) -> None:
    (tmp_path / "parameter.yaml").write_text("- 1\n")
    said = asked("reranker", ("build", {"parameter_file": str(tmp_path / "parameter.yaml")}))[0]
    assert "holds a list; it must map names to values" in said
    (tmp_path / "parameter.yaml").write_text("top_k: 1\n")
    said = asked("reranker", ("build", {"parameter_file": str(tmp_path / "parameter.yaml")}))[0]
    assert f"{tmp_path.name}.py' is not there" in said
