"""langchain-tests: RetrieversIntegrationTests"""

from typing import Any

import pytest
from langchain_tests.integration_tests import RetrieversIntegrationTests

from ultrarag.doors.langchain import UltraRAGRetriever


class TestUltraRAGRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _filled(self, live) -> None:
        live.add([{"id": str(n), "text": f"Document {n} is about vectors."} for n in range(5)])
        self._params = {"index": live, "weights": {"dense": 1, "bm25": 0.5}}

    @property
    def retriever_constructor(self) -> type[UltraRAGRetriever]:
        return UltraRAGRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return self._params

    @property
    def retriever_query_example(self) -> str:
        return "vectors"
