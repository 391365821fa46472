"""langchain-tests: VectorStoreIntegrationTests"""

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests


class TestUltraRAGVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, store) -> VectorStore:
        return store
