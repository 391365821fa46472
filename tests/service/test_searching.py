"""What the service's own endpoints answer, and how they fail."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from tests.service.running import Running
from ultrarag.service import Limits


def fault(response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["message"]


def test_a_search_names_the_generation_that_answered(served: Running) -> None:
    found = served.post("/v1/search", {"query": "what is milvus?", "k": 2}).json()
    wanted = served.live.search("what is milvus?", 2)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in wanted]
    assert found["hits"][0]["id"] == "milvus"
    assert (found["generation"], found["fingerprint"]) == (wanted.generation, wanted.fingerprint)
    assert len(found["query_id"]) == 32
    first = found["hits"][0]
    assert first["metadata"] == {"lang": "en", "year": 2019}
    assert first["text"] == "Milvus is a vector database."
    assert first["scores"]["dense"] == pytest.approx(wanted[0].score)


def test_options_reach_the_search(served: Running) -> None:
    body = {"query": "apfel", "weights": {"dense": 1, "bm25": 0.5}, "filter": {"lang": "de"}, "texts": False}
    found = served.post("/v1/search", body).json()
    assert [set(hit) for hit in found["hits"]] == [{"id", "score", "scores"}]
    assert set(found["hits"][0]["scores"]) == {"dense", "bm25"}
    among = served.post("/v1/search", {"query": "vectors", "ids": ["apfel", "qdrant"]}).json()["hits"]
    assert [hit["id"] for hit in among] == ["qdrant", "apfel"]
    bound = {"query": "vectors", "ids": ["apfel", "qdrant"], "min_scores": {"dense": among[0]["score"] - 0.01}}
    assert len(served.post("/v1/search", bound).json()["hits"]) == 1
    apart = {"query": "vectors", "k": 2, "mmr": 0}
    hits = served.live.search("vectors", 2, mmr=0)
    assert [hit["id"] for hit in served.post("/v1/search", apart).json()["hits"]] == [hit.id for hit in hits]
    assert served.post("/v1/search", {**apart, "mmr": 2}).status_code == 400


def test_many_queries_are_searched_together(served: Running) -> None:
    found = served.post("/v1/search_many", {"queries": ["vector database", "", "deep ocean"], "k": 1}).json()["results"]
    assert [[hit["id"] for hit in one["hits"]] for one in found] == [["milvus"], [], ["ocean/deep #1"]]
    assert len({one["query_id"] for one in found}) == 3


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"query": "x", "weights": {"dens": 1}}, 400, "did you mean 'dense'?"),
        ({"query": "x", "filter": {"year": {"over": 1}}}, 400, "unknown bound 'over'"),
        ({"query": "x", "k": 0}, 400, "'k': Input should be greater than or equal to 1, not 0"),
        ({"query": "x", "k": True}, 400, "'k': Input should be a valid integer, not True"),
        ({"query": "x", "fusion": "sum"}, 400, "fusion is 'sum'"),
        ({"query": "x", "normalize": "z"}, 400, "normalize is 'z'"),
        ({"query": "x", "top": 3}, 400, "'top': Extra inputs are not permitted"),
        ({}, 400, "'query': Field required"),
        ({"query": "x", "k": 1001}, 413, "k: 1,001 asked for, and this service takes at most 1,000"),
        ({"query": "x", "heads": ["dense", "bm25"], "fusion": "sum"}, 400, "fusion is 'sum'"),
    ],
)
def test_what_cannot_be_searched_is_said_in_the_librarys_words(served: Running, body, status, words) -> None:
    code, message = fault(served.post("/v1/search", body))
    assert code == status
    assert words in message


@pytest.mark.parametrize(
    ("method", "path", "body", "message"),
    [
        ("DELETE", "/v1/passages", {}, "give either ids or a filter"),
        (
            "POST",
            "/v1/search_many",
            {"queries": []},
            "'queries': List should have at least 1 item after validation, not 0",
        ),
        ("POST", "/v1/search", {"query": "x", "top": 3}, "'top': Extra inputs are not permitted"),
    ],
)
def test_an_error_says_once_what_was_sent(served: Running, method, path, body, message) -> None:
    assert fault(served.client.request(method, path, json=body)) == (400, message)


def test_a_long_id_is_shortened_and_what_to_do_stays(served: Running) -> None:
    body = {"query_id": "x" * 100_000, "passage_id": "milvus", "action": "click"}
    status, message = fault(served.post("/v1/feedback", body))
    assert status == 400
    assert len(message) < 1100
    assert " ... " in message
    short = fault(served.post("/v1/feedback", {**body, "query_id": "none"}))[1]
    assert message.endswith(short[-100:])


def test_a_model_is_found_by_twelve_digits_of_its_fingerprint(served: Running) -> None:
    whole = served.live.fingerprint
    assert served.get(f"/v1/models/{whole[:12].upper()}").json()["id"] == whole
    code, message = fault(served.get(f"/v1/models/{whole[:11]}"))
    assert code == 404
    assert f"known: {whole}, default" in message


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("POST", "/v1/rollback", {"json": {"generation": 1}}),
        ("POST", "/v1/jobs/x/cancel", {"content": b"{"}),
        ("DELETE", "/v1/passages/milvus", {"params": {"if_match": "3"}}),
        ("GET", "/v1/status", {"params": {"pretty": ""}}),
        ("POST", "/v1/search?k=1", {"json": {"query": "x"}}),
    ],
)
def test_what_an_endpoint_does_not_read_is_refused(served: Running, method, path, options) -> None:
    typed = {"Content-Type": "application/json"}
    assert fault(served.client.request(method, path, headers=typed, **options))[0] == 400
    assert served.get("/v1/passages/milvus").status_code == 200


def test_what_is_no_json_is_refused(served: Running) -> None:
    typed = {"Content-Type": "application/json"}
    for content in (b"{", b'{"query": NaN}', b'{"query": "\\ud800"}', b"[" * 100_000, b"\xff"):
        assert served.client.post("/v1/search", content=content, headers=typed).status_code == 400
    plain = served.client.post("/v1/search", content=b'{"query": "x"}', headers={"Content-Type": "text/plain"})
    assert fault(plain) == (415, "the body's Content-Type is 'text/plain'; it must be application/json")


def test_there_is_an_error_for_what_is_nowhere(served: Running) -> None:
    assert fault(served.get("/v1/serch"))[0] == 404
    assert served.client.put("/v1/search").status_code == 405


def test_passages_are_added_listed_and_deleted(served: Running) -> None:
    added = served.post(
        "/v1/passages", {"passages": [{"id": "new", "text": "A new text.", "metadata": {"lang": "fr"}}]}
    )
    assert added.json() == {"added": 1, "changed": 0, "metadata": 0, "unchanged": 0, "passages": 5}
    page = served.get("/v1/passages", params={"limit": 3}).json()
    rest = served.get("/v1/passages", params={"limit": 3, "after": page["next"]}).json()
    assert [p["id"] for p in page["passages"] + rest["passages"]] == sorted(
        ["milvus", "qdrant", "apfel", "ocean/deep #1", "new"]
    )
    assert rest["next"] is None
    english = served.get(
        "/v1/passages", params={"filter": json.dumps({"lang": "en"}), "ids": ["milvus", "apfel"]}
    ).json()
    assert [p["id"] for p in english["passages"]] == ["milvus"]
    assert served.get("/v1/count", params={"filter": '{"lang": "en"}'}).json() == {"count": 3}
    again = {"passages": [{"id": "new", "text": "Another text."}], "on_existing": "fail"}
    assert served.post("/v1/passages", again).status_code == 409
    assert served.post("/v1/passages", {**again, "on_existing": "skip"}).json()["added"] == 0
    update = {"filter": {"lang": "en"}, "metadata": {"seen": True}}
    assert served.client.patch("/v1/passages", json=update).json() == {"updated": 3}
    assert served.get("/v1/passages/milvus").json()["metadata"]["seen"] is True
    gone = served.client.request("DELETE", "/v1/passages", json={"filter": {"lang": "fr"}})
    assert gone.json() == {"deleted": 1, "passages": 4}
    assert served.client.delete("/v1/passages/ocean%2Fdeep%20%231").json() == {"deleted": 1, "passages": 3}
    assert fault(served.get("/v1/passages/ocean%2Fdeep%20%231")) == (404, "there is no passage 'ocean/deep #1'")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"passages": [{"id": "a", "text": "\u200b"}]}, "'a'"),
        ({"passages": [{"id": "", "text": "x"}]}, "'passages.0.id'"),
        ({"passages": []}, "'passages'"),
        ({"passages": [{"id": "a", "text": "x", "metadata": {"big": 10**400}}]}, "passage 'a'"),
    ],
)
def test_passages_that_no_index_holds_are_refused(served: Running, body, words) -> None:
    code, message = fault(served.post("/v1/passages", body))
    assert code == 400
    assert words in message
    assert len(served.live) == 4


def test_deleting_everything_takes_more_than_an_empty_filter(served: Running) -> None:
    assert served.client.request("DELETE", "/v1/passages", json={"filter": {}}).status_code == 400
    assert served.client.request("DELETE", "/v1/passages", json={}).status_code == 400
    assert len(served.live) == 4


def test_status_health_and_metrics(served: Running) -> None:
    served.post("/v1/search", {"query": "a secret question"})
    assert served.get("/health").json() == {"status": "ok"}
    status = served.get("/v1/status").json()
    assert status["index"]["passages"] == 4
    assert status["service"]["pending"]["searches"] == 0
    text = served.get("/metrics").text
    assert 'ultrarag_http_requests_total{method="POST",route="/v1/search",status="200"}' in text
    assert "ultrarag_passages 4.0" in text
    assert f'ultrarag_live_info{{fingerprint="{served.live.fingerprint[:12]}"}} 1.0' in text
    assert 'ultrarag_search_answers_total{generation="1"}' in text
    assert "secret" not in text


def test_the_access_log_holds_no_text_and_no_id(served: Running, caplog) -> None:
    caplog.set_level(logging.INFO, "ultrarag")
    served.post("/v1/search", {"query": "a secret question"})
    served.get("/v1/passages/secret-id")
    served.get("/v1/passages", params={"filter": '{"secret": 1}'})
    served.post("/v1/search", {"query": "secret", "filter": {"secret": {"secret": 1}}})
    deadline = time.monotonic() + 10
    while len(caplog.records) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "POST /v1/search 200" in caplog.text
    assert "GET /v1/passages/{id:path} 404" in caplog.text
    assert "secret" not in caplog.text


def test_too_much_at_once_is_sent_away(index) -> None:
    running, release = Running(index, limits=Limits(waiting=1)), threading.Event()
    try:
        running.service.searches.submit(release.wait)
        running.service.searches.pending = 1
        response = running.post("/v1/search", {"query": "x"})
        assert fault(response)[0] == 503
        assert response.headers["Retry-After"] == "1"
        running.service.searches.pending = 0
        assert running.post("/v1/search", {"query": "x"}).status_code == 200
    finally:
        release.set()
        running.stop()


def test_a_fault_of_ours_is_told_to_the_log_alone(served: Running, monkeypatch, caplog) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(served.live, "search_many", broken)
    response = served.post("/v1/search", {"query": "x"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["X-Request-Id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text
