"""Run by the peer's Python: UltraRAG's own Retriever and Reranker against a service, as their servers use them.

Standard input: {"checkout", "url", "model", "corpus", "queries", "passages", "folder"}; prints results as JSON.
"""

import asyncio
import json
import sys

given = json.load(sys.stdin)
sys.path[:0] = [f"{given['checkout']}/servers/{name}/src" for name in ("retriever", "reranker")]

import reranker  # noqa: E402
import retriever  # noqa: E402


async def said(call):
    try:
        return await call
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def openai(model, **more):
    return {"openai": {"model_name": model, "api_key": "any", **more}}


async def embedded(model):
    """Its openai backend with faiss: embed, index, search."""
    own = retriever.Retriever(retriever.app)
    await own.retriever_init(
        "unused",
        openai(model, base_url=f"{given['url']}/v1"),
        4,
        given["corpus"],
        backend="openai",
        index_backend="faiss",
        index_backend_configs={"faiss": {"index_use_gpu": False, "index_path": f"{given['folder']}/{model}.index"}},
    )
    vectors = f"{given['folder']}/{model}.npy"
    await own.retriever_embed(vectors)
    await own.retriever_index(vectors)
    return await own.retriever_search(given["queries"], 3)


async def reranked(model):
    own = reranker.Reranker(reranker.app)
    await own.reranker_init("unused", openai(model, base_url=f"{given['url']}/v1/rerank"), 4, backend="openai")
    return await own.reranker_rerank(given["queries"], given["passages"], 2)


async def main():
    deployed = retriever.Retriever(retriever.app).retriever_deploy_search(given["url"], given["queries"], 3)
    return {
        "deployed": await said(deployed),
        "embedded": await said(embedded(given["model"])),
        "reranked": await said(reranked(given["model"])),
        "embedded by another": await said(embedded("0123456789abcdef")),
        "reranked by another": await said(reranked("0123456789abcdef")),
    }


print("RESULT " + json.dumps(asyncio.run(main())))
