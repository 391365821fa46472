"""The table of docs/models.md: tiny copies of published layouts, loaded, fine-tuned, with LoRA, reloaded and indexed.

Each copy (`ultrarag.testing.layouts`) is compared with sentence-transformers on the same folder, before and after, to
1e-5. What is refused stands in a second table, with the words (`models_refused.py`). The page's text stands in it
already; the tables between their marks are made anew.

    python benchmarks/models.py            # all families, and writes the page
    python benchmarks/models.py e5 KaLM    # some, printed
    python benchmarks/models.py refused    # what is refused, printed
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_refused import REFUSED, words
from models_refused import table as refusals

from ultrarag import Encoder
from ultrarag.claims import ModelFolder
from ultrarag.encoder import find_adapter
from ultrarag.errors import UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.layouts import LAYOUTS, Layout, write_layout
from ultrarag.testing.tiny import (
    TEXTS,
    tiny_cross_encoder,
    tiny_embedding_gemma2,
    tiny_m3,
    tiny_router,
    tiny_splade,
    tiny_static,
)
from ultrarag.testing.tiny_causal import tiny_causal_reranker
from ultrarag.testing.tiny_colbert import COLBERT_LAYOUTS, tiny_colbert
from ultrarag.types import Passage

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python benchmarks/models.py -->", "<!-- end of table -->"
REFUSALS, END_REFUSALS = "<!-- refusals: python benchmarks/models.py -->", "<!-- end of refusals -->"
TOLERANCE = 1e-5
QUERIES, PASSAGES = list(TEXTS[0::2]), list(TEXTS[1::2])
ROWS = [
    {"query": query, "pos": [PASSAGES[number]], "neg": [PASSAGES[number - 1]]} for number, query in enumerate(QUERIES)
]
RUN: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "train_group_size": 2,
    "query_max_len": 64,
    "passage_max_len": 64,
    "use_cpu": True,
    "skip_data_check": True,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Outcome:
    """What became of one family's tiny copy: the largest difference from the library's vectors at each stage."""

    loaded: float
    tuned: float
    #: None: refused by name, for there is no linear layer
    lora: float | None
    #: each query's passage is scored in an index as by the vectors; None: a reranker has none
    index: float | None
    #: the adapter that was chosen where none was named is the one that the layout says
    chosen: bool = True

    @property
    def sound(self) -> bool:
        found = (self.loaded, self.tuned, self.lora, self.index)
        return self.chosen and all(value <= TOLERANCE for value in found if value is not None)


def run(layout: Layout, folder: Path) -> Outcome:
    """Take one family's tiny copy through everything, in `folder`."""
    write_layout(folder / "model", layout)
    adapter = layout.adapter if layout.chosen is not None else None  # by itself, where that is the best
    names = {adapter, layout.chosen or adapter}
    encoders = [Encoder.load(folder / "model", name, device="cpu") for name in names]
    loaded = max(_difference(encoder, folder / "model", layout) for encoder in encoders)
    tuned, lora = (
        finetune(str(folder / "model"), ROWS, folder / name, adapter=adapter, **RUN, **more).checkpoint
        for name, more in {"tuned": {}, "lora": {"use_lora": True, "lora_rank": 4}}.items()
    )
    wanted = layout.adapter if layout.chosen is None else layout.chosen
    return Outcome(
        loaded,
        *(_difference(Encoder.load(path), Path(path), layout) for path in (tuned, lora)),
        index=_indexed(Encoder.load(tuned), folder / "index"),
        chosen=_chosen(folder / "model") == wanted,
    )


@dataclass(frozen=True)
class Other:
    """A family whose models are no dense encoder of one backbone."""

    #: writes a tiny copy into a folder
    write: Callable[[Path], object]
    head: str
    adapter: str
    #: a published model
    example: str = ""
    #: whether a model of it has linear layers, which LoRA adapts
    lora: bool = True


OTHERS = {
    "cross-encoder": Other(tiny_cross_encoder, "score", "bge-reranker", "BAAI/bge-reranker-v2-m3"),
    "Qwen3-Reranker": Other(
        partial(tiny_causal_reranker, layout="qwen3"), "score", "causal-reranker", "Qwen/Qwen3-Reranker-0.6B"
    ),
    "Qwen3-Reranker, classifier": Other(
        partial(tiny_causal_reranker, layout="qwen3-classifier"), "score", "causal-reranker"
    ),
    "mxbai-rerank-v2": Other(
        partial(tiny_causal_reranker, layout="mxbai"), "score", "causal-reranker", "mixedbread-ai/mxbai-rerank-base-v2"
    ),
    "zerank": Other(partial(tiny_causal_reranker, layout="zerank"), "score", "causal-reranker", "zeroentropy/zerank-1"),
    "bge-m3": Other(partial(tiny_m3, modules=True), "dense", "bgem3", "BAAI/bge-m3"),
    "EmbeddingGemma 2": Other(tiny_embedding_gemma2, "dense", "bge"),
    "SPLADE": Other(tiny_splade, "sparse", "sentence-transformers", "naver/splade-v3"),
    "SPLADE, published without modules": Other(
        partial(tiny_splade, bare=True),
        "sparse",
        "sentence-transformers",
        "naver/splade-cocondenser-ensembledistil",
    ),
    "inference-free sparse (Router)": Other(
        tiny_router,
        "sparse",
        "sentence-transformers",
        "opensearch-project/opensearch-neural-sparse-encoding-doc-v3-distill",
    ),
    "Router, two models": Other(partial(tiny_router, kind="dense"), "dense", "sentence-transformers"),
    "Router, a projection for each side": Other(partial(tiny_router, kind="heads"), "dense", "sentence-transformers"),
    "Router, queries by static vectors": Other(partial(tiny_router, kind="static"), "dense", "sentence-transformers"),
    "potion (model2vec)": Other(
        partial(tiny_static, model2vec=True), "dense", "static", "minishlab/potion-base-8M", lora=False
    ),
    "static": Other(tiny_static, "dense", "static", "sentence-transformers/static-retrieval-mrl-en-v1", lora=False),
    **{
        f"late interaction, {layout}": Other(partial(tiny_colbert, layout=layout), "colbert", "colbert", example)
        for layout, example in zip(
            COLBERT_LAYOUTS, ("lightonai/GTE-ModernColBERT-v1", "colbert-ir/colbertv2.0", ""), strict=True
        )
    },
}


def run_other(family: Other, folder: Path) -> Outcome:
    """The same for a family whose tiny copy is written in another way."""
    model = folder / "model"
    model.mkdir()
    family.write(model)
    paths = [model]
    for name, more in {"tuned": {}, "lora": {"use_lora": True, "lora_rank": 4}}.items():
        if name == "tuned" or family.lora:
            paths.append(Path(finetune(str(model), ROWS, folder / name, **RUN, **more).checkpoint))
    encoders = [Encoder.load(path, device="cpu") for path in paths]
    compare = {
        "dense": _dense_difference,
        "sparse": _sparse_difference,
        "colbert": _late_difference,
        "score": _score_difference,
    }
    compare = compare[family.head]
    found = [compare(encoder, path) for encoder, path in zip(encoders, paths, strict=True)]
    loaded, tuned, lora = found if family.lora else [*found, None]
    index = None if family.head == "score" else _indexed(encoders[1], folder / "index", family.head)
    return Outcome(loaded, tuned, lora, index=index, chosen=_chosen(model) == family.adapter)


def _sides(library: Any) -> tuple[tuple[str, Callable[..., Any]], ...]:
    """Our kinds of text, and how sentence-transformers encodes them."""
    return ("query", library.encode_query), ("passage", library.encode_document)


def _dense_difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a component, of queries and documents."""
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(_readable(folder)), device="cpu")
    pairs = [
        (encoder.encode(TEXTS, kind).dense, encode(list(TEXTS), normalize_embeddings=bool(encoder.settings.normalize)))
        for kind, encode in _sides(library)
    ]
    return max(float(np.abs(ours - theirs).max()) / max(1.0, float(np.abs(theirs).max())) for ours, theirs in pairs)


def _readable(folder: Path) -> Path:
    """The folder that sentence-transformers reads: of EmbeddingGemma 2 the text model, the rest needs torchvision."""
    from transformers import AutoModel

    if ModelFolder(folder).model_type != "embedding_gemma2":
        return folder
    text = folder.with_name(f"{folder.name}-text")
    shutil.copytree(folder, text, ignore=shutil.ignore_patterns("*.safetensors", "*config.json", "ultrarag.json"))
    for name in ("tokenizer_config.json", "1_Pooling/config.json"):
        shutil.copyfile(folder / name, text / name)
    AutoModel.from_pretrained(folder).language_model.save_pretrained(text)
    return text


def _score_difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a pair's score, before sentence-transformers' activation."""
    from sentence_transformers import CrossEncoder

    pairs = list(zip(QUERIES, PASSAGES, strict=False))
    library = CrossEncoder(str(folder), device="cpu")
    theirs = library.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    return float(np.abs(encoder.score(pairs) - np.asarray(theirs, np.float32).reshape(-1)).max())


def _sparse_difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a weight of any token."""
    from sentence_transformers import SparseEncoder

    library = SparseEncoder(str(folder), device="cpu")
    found = []
    for kind, encode in _sides(library):
        theirs = encode(list(TEXTS), convert_to_tensor=True).to_dense().numpy()
        ours = np.zeros(theirs.shape, np.float32)
        sparse = encoder.encode(TEXTS, kind).sparse
        for row, ids, weights in zip(ours, sparse.ids, sparse.weights, strict=True):
            row[ids[ids >= 0]] = weights[ids >= 0]
        found.append(float(np.abs(ours - theirs).max()))
    return max(found)


def _late_difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a component of any token's vector; infinite where the tokens are others."""
    from sentence_transformers import MultiVectorEncoder

    library = MultiVectorEncoder(str(folder), device="cpu")
    found = []
    for kind, encode in _sides(library):
        ours = encoder.encode(TEXTS, kind)
        for tokens, mask, theirs in zip(ours.colbert, ours.mask, encode(list(TEXTS)), strict=True):
            pair = tokens[mask.astype(bool)], np.asarray(theirs)
            found.append(float(np.abs(pair[0] - pair[1]).max()) if pair[0].shape == pair[1].shape else float("inf"))
    return max(found)


def _chosen(folder: Path) -> str:
    """The adapter that is chosen for a folder; empty where one has to be named."""
    try:
        return find_adapter(folder)
    except UsageError:
        return ""


def _difference(encoder: Encoder, folder: Path, layout: Layout) -> float:
    """The largest difference of a component from the vectors that sentence-transformers gives of the folder."""
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(str(folder), device="cpu")
    unit = bool(encoder.settings.normalize)
    query = layout.default_prompt if "query" not in layout.prompts else "query"
    passage = next((name for name in ("document", "passage") if name in layout.prompts), None)
    found = []
    for kind, texts, name in (("query", QUERIES, query), ("passage", PASSAGES, passage)):
        prompt = {"prompt_name": name} if name in library.prompts else {"prompt": ""}
        theirs = library.encode(texts, normalize_embeddings=unit, **prompt)
        ours = encoder.encode(texts, kind).dense
        found.append(float(np.abs(ours - theirs).max()) / max(1.0, float(np.abs(theirs).max())))
    return max(found)


def _indexed(encoder: Encoder, folder: Path, head: str = "dense") -> float:
    sides = encoder.encode(QUERIES, "query"), encoder.encode(PASSAGES)
    wanted = encoder.similarity(*sides, weights={head: 1.0})
    with LiveIndex.create(folder, encoder) as index:
        index.add([Passage(str(number), text) for number, text in enumerate(PASSAGES)])
        off = [
            abs(hit.scores[head] - wanted[row, int(hit.id)])
            for row, query in enumerate(QUERIES)
            for hit in index.search(query, k=len(PASSAGES), weights={head: 1.0})
        ]
    return max(off) / max(1.0, float(np.abs(wanted).max()))


def table(outcomes: dict[str, Outcome]) -> str:
    """The page's table, one line per family."""
    lines = [
        "| family | for example | adapter | chosen by itself | loaded | fine-tuned | LoRA | index |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        if (layout := LAYOUTS.get(name)) is None:
            layout = Layout("", adapter=OTHERS[name].adapter, example=OTHERS[name].example)
        stages = [_word(outcome.loaded), _word(outcome.tuned), _word(outcome.lora, "refused"), _word(outcome.index)]
        example = f"`{layout.example}`" if layout.example else ""
        other = f"`{layout.chosen}`, which is equal too" if layout.chosen else "no: it has to be named"
        chosen = ("yes" if layout.chosen is None else other) if outcome.chosen else "another"
        lines.append(f"| {name} | {example} | `{layout.adapter}` | {chosen} | {' | '.join(stages)} |")
    return "\n".join(lines)


def _word(difference: float | None, without: str = "-") -> str:
    if difference is None:
        return without
    return "equal" if difference <= TOLERANCE else f"off by {difference:.1g}"


def main() -> int:
    """Run the families, write or print the table; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all, and the page is written")
    known = [*LAYOUTS, *OTHERS]
    chosen = parser.parse_args().families or [*known, "refused"]
    if unknown := [name for name in chosen if name not in (*known, "refused")]:
        parser.error(f"no family '{unknown[0]}': it is one of {', '.join(known)}, or 'refused'")
    outcomes, said = {}, {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            if name == "refused":
                said = all_refused(path)
                continue
            outcomes[name] = run_other(OTHERS[name], path) if name in OTHERS else run(LAYOUTS[name], path)
        print(name, outcomes[name], file=sys.stderr)
    if chosen == [*known, "refused"]:
        page = _between(PAGE.read_text(encoding="utf-8"), BEGIN, END, table(outcomes))
        PAGE.write_text(_between(page, REFUSALS, END_REFUSALS, refusals(said)), encoding="utf-8")
    else:
        print(*[table(outcomes)] * bool(outcomes), *[refusals(said)] * bool(said), sep="\n")
    return 0 if all(outcome.sound for outcome in outcomes.values()) and all(said.values()) else 1


def all_refused(place: Path) -> dict[str, str]:
    """The words of every refusal."""
    found = {}
    for number, (what, refused) in enumerate(REFUSED.items()):
        (place / str(number)).mkdir()
        found[what] = words(refused, place / str(number))
    return found


def _between(page: str, begin: str, end: str, text: str) -> str:
    """A page with a new text between two marks."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    sys.exit(main())
