"""langchain-tests: EmbeddingsUnitTests and EmbeddingsIntegrationTests"""

from typing import Any

import pytest
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from ultrarag.doors.langchain import UltraRAGEmbeddings


class Params:
    """What both suites construct the class with."""

    @pytest.fixture(autouse=True)
    def _loaded(self, minilm_encoder) -> None:
        self._params = {"model": minilm_encoder}

    @property
    def embeddings_class(self) -> type[UltraRAGEmbeddings]:
        return UltraRAGEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return self._params


class TestUnit(Params, EmbeddingsUnitTests):
    pass


class TestIntegration(Params, EmbeddingsIntegrationTests):
    pass
