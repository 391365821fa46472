"""The tools of UltraRAG's server `retriever`, with its names and signatures, answered by a live index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request

from ultrarag.doors.ultrarag_v3.backend import Backend, answered
from ultrarag.doors.ultrarag_v3.wiring import tool
from ultrarag.errors import FingerprintError, UsageError
from ultrarag.io import print_error
from ultrarag.retrieve.passages import passage_file
from ultrarag.types import Passage

#: Queries of a request, passages of one, ids of one.
QUERIES, PASSAGES, IDS = 64, 500, 1000
#: Characters of a fingerprint that are enough to name it.
FEWEST_OF_FINGERPRINT = 12
#: A result of a search: for each query the texts found, best first.
Texts = list[list[str]]


class Retriever:
    """One pipeline's retriever: what `retriever_init` was given, and searches on it."""

    def __init__(self) -> None:
        self._given: Backend | None = None
        self._fingerprint = ""
        self._corpus = ""

    @tool()
    def retriever_init(
        self,
        model_name_or_path: str,
        backend_configs: dict[str, Any],
        batch_size: int,
        corpus_path: str,
        gpu_ids: str | int | None = None,
        is_multimodal: bool = False,
        backend: str = "sentence_transformers",
        index_backend: str = "faiss",
        index_backend_configs: dict[str, Any] | None = None,
        is_demo: bool = False,
        collection_name: str = "",
    ) -> None:
        """Name the service whose index answers; what is about models and index files is the service's own."""
        _refuse_images(is_multimodal)
        found = Backend.of(backend, backend_configs)
        live = found.ask("GET", "/v1/status")["index"]["live"]["fingerprint"]
        self._fingerprint = _pinned(model_name_or_path, live)
        self._given, self._corpus = found, corpus_path

    @tool()
    def retriever_embed(
        self, embedding_path: str | None = None, overwrite: bool = False, is_multimodal: bool = False
    ) -> None:
        """Nothing: `retriever_index` encodes what it adds, and a swap encodes it anew."""
        _refuse_images(is_multimodal)
        print_error("retriever_embed: nothing to do; the index encodes what retriever_index adds")

    @tool()
    def retriever_index(
        self, embedding_path: str, overwrite: bool = False, collection_name: str = "", corpus_path: str = ""
    ) -> None:
        """Add a corpus; passages with the same ids are replaced, and with `overwrite` the collection's others go."""
        self._add(corpus_path or self._corpus, overwrite, collection_name)

    @tool({"query_list": "q_ls"}, "ret_psg")
    def retriever_search(
        self, query_list: list[str], top_k: int = 5, query_instruction: str = "", collection_name: str = ""
    ) -> dict[str, Texts]:
        """Search the live generation, by all heads that have a weight."""
        return {"ret_psg": self._search(query_list, top_k, query_instruction, collection_name)}

    @tool({}, "ret_psg_ls")
    def retriever_batch_search(
        self, batch_query_list: list[list[str]], top_k: int = 5, query_instruction: str = "", collection_name: str = ""
    ) -> dict[str, list[Texts]]:
        """Search for several lists of queries."""
        found = self._search(
            [q for queries in batch_query_list for q in queries], top_k, query_instruction, collection_name
        )
        rest = iter(found)
        return {"ret_psg_ls": [list(islice(rest, len(queries))) for queries in batch_query_list]}

    @tool({"query_list": "q_ls"}, "project_memory_content")
    def retriever_project_memory_search(
        self, query_list: list[str], top_k: int = 5, query_instruction: str = "", current_user_id: str = ""
    ) -> dict[str, Texts]:
        """Search the collection user_ID, as UltraRAG names that of a user's memory."""
        collection = f"user_{current_user_id.strip() or 'default'}"
        return {"project_memory_content": self._search(query_list, top_k, query_instruction, collection)}

    @tool()
    def bm25_index(self, overwrite: bool = False) -> None:
        """Add the corpus that `retriever_init` was given; the index keeps the words of all passages by itself."""
        self._add(self._corpus, overwrite, "")

    @tool({"query_list": "q_ls"}, "ret_psg")
    def bm25_search(self, query_list: list[str], top_k: int = 5) -> dict[str, Texts]:
        """Search by words alone."""
        return {"ret_psg": self._search(query_list, top_k, weights={"bm25": 1.0})}

    @tool({"query_list": "q_ls"}, "ret_psg")
    def retriever_deploy_search(
        self, retriever_url: str, query_list: list[str], top_k: int = 5, query_instruction: str = ""
    ) -> dict[str, Texts]:
        """Search another retriever that is deployed, ours or UltraRAG's own, by its /search."""
        url = retriever_url.strip()
        parts = urlsplit(url if url.startswith(("http://", "https://")) else f"http://{url}")
        address, headers = f"{parts.scheme}://{parts.netloc}/search", {"Content-Type": "application/json"}
        found: Texts = []
        for start in range(0, len(query_list), QUERIES):
            body = {"query_list": query_list[start : start + QUERIES], "top_k": top_k}
            data = json.dumps({**body, "query_instruction": query_instruction}).encode()
            found += answered(Request(address, data, headers), timeout=60)["ret_psg"]
        return {"ret_psg": found}

    @tool({"query_list": "q_ls"}, "ret_psg")
    def retriever_websearch(
        self,
        query_list: list[str],
        top_k: int | None = 5,
        retrieve_thread_num: int | None = 1,
        websearch_backend: str = "tavily",
        websearch_backend_configs: dict[str, Any] | None = None,
    ) -> dict[str, Texts]:
        """Refused: an index does not search the web."""
        raise UsageError(NO_WEB)

    @tool({}, "ret_psg_ls")
    def retriever_batch_websearch(
        self,
        batch_query_list: list[list[str]],
        top_k: int | None = 5,
        retrieve_thread_num: int | None = 1,
        websearch_backend: str = "tavily",
        websearch_backend_configs: dict[str, Any] | None = None,
    ) -> dict[str, list[Texts]]:
        """Refused: an index does not search the web."""
        raise UsageError(NO_WEB)

    @property
    def _service(self) -> Backend:
        if self._given is None:
            raise UsageError("no index is named yet: the pipeline must call retriever_init first")
        return self._given

    def _search(
        self,
        queries: list[str],
        top_k: int,
        instruction: str = "",
        collection: str = "",
        weights: dict[str, float] | None = None,
    ) -> Texts:
        service = self._service
        conditions = [c for c in (service.filter, _of(service, collection)) if c]
        body: dict[str, Any] = {"k": top_k, "weights": weights or service.weights}
        if conditions:
            body["filter"] = {"and": conditions} if len(conditions) > 1 else conditions[0]
        asked = [f"{instruction}{query}" if query.strip() else "" for query in queries]
        return [
            texts
            for start in range(0, len(asked), QUERIES)
            for texts in self._found(service, {**body, "queries": asked[start : start + QUERIES]})
        ]

    def _found(self, service: Backend, body: dict[str, Any]) -> Iterator[list[str]]:
        for one in service.ask("POST", "/v1/search_many", body)["results"]:
            if not one["fingerprint"].startswith(self._fingerprint):
                raise FingerprintError(_other(self._fingerprint, one["fingerprint"]))
            yield [Passage(hit["id"], hit["text"], hit["title"]).content for hit in one["hits"]]

    def _add(self, corpus: str, overwrite: bool, collection: str) -> None:
        service = self._service
        if overwrite and not collection:
            raise UsageError(
                "overwrite is true without a collection_name: everything else would go from a live index. Passages of "
                "the same ids are replaced without it; `ultrarag index delete` removes others"
            )
        with passage_file(corpus, layout="ultrarag_v3") as source:
            if source.renamed:
                print_error(f"{corpus}: {source.renamed} rows repeat an id, added as '{source.example}' and so on")
            rows = (_row(passage, service, collection) for passage in source)
            written = self._written(service, rows)
        if overwrite:
            self._remove(service, _listed(service, _of(service, collection)) - written)

    def _written(self, service: Backend, rows: Iterator[dict[str, Any]]) -> set[str]:
        ids: set[str] = set()
        while part := list(islice(rows, PASSAGES)):
            service.ask("POST", "/v1/passages", {"passages": part})
            ids.update(row["id"] for row in part)
        return ids

    def _remove(self, service: Backend, ids: set[str]) -> None:
        rest = iter(sorted(ids))
        while part := list(islice(rest, IDS)):
            service.ask("DELETE", "/v1/passages", {"ids": part})


NO_WEB = (
    "a live index does not search the web: name UltraRAG's own server beside this one (servers: web: "
    "servers/retriever) and write the step web.retriever_websearch"
)


def _refuse_images(is_multimodal: bool) -> None:
    if is_multimodal:
        raise UsageError("is_multimodal is true: a live index holds texts; use UltraRAG's own server for images")


def _pinned(name: str, live: str) -> str:
    """The fingerprint, or the beginning of it, that answers must have; empty for any."""
    wanted = name.strip().lower()
    if wanted in ("", "default"):
        return ""
    if len(wanted) < FEWEST_OF_FINGERPRINT or not all(c in "0123456789abcdef" for c in wanted):
        raise UsageError(
            f"model_name_or_path is '{name}': the model is the service's own. Write default, or the fingerprint "
            f"({live[:FEWEST_OF_FINGERPRINT]} is live) to be refused when another one answers"
        )
    if not live.startswith(wanted):
        raise FingerprintError(_other(wanted, live))
    return wanted


def _other(wanted: str, live: str) -> str:
    return (
        f"model_name_or_path names {wanted[:FEWEST_OF_FINGERPRINT]}, and {live[:FEWEST_OF_FINGERPRINT]} is live: name "
        "that one, or default for whichever is"
    )


def _of(service: Backend, collection: str) -> dict[str, Any] | None:
    """The filter of a collection; None for the whole index."""
    return {service.collection_field: collection} if collection else None


def _row(passage: Passage, service: Backend, collection: str) -> dict[str, Any]:
    """A passage for the service; ids of a collection begin with its name, for each corpus counts from 0."""
    row: dict[str, Any] = {
        "id": passage.id,
        "text": passage.text,
        "title": passage.title,
        "metadata": dict(passage.metadata),
    }
    if collection:
        row["id"] = f"{collection}/{passage.id}"
        row["metadata"] = {**row["metadata"], service.collection_field: collection}
    return row


def _listed(service: Backend, condition: dict[str, Any] | None) -> set[str]:
    """The ids of the passages that pass a filter."""
    ids: set[str] = set()
    after: str | None = ""
    while after is not None:
        asked = urlencode({"filter": json.dumps(condition), "after": after, "limit": IDS}, quote_via=quote)
        page = service.ask("GET", f"/v1/passages?{asked}")
        ids.update(passage["id"] for passage in page["passages"])
        after = page["next"]
    return ids
