"""The table of docs/models.md: tiny copies of published layouts, loaded, fine-tuned, with LoRA, reloaded and indexed.

Each copy (`ultrarag.testing.layouts`) is compared with sentence-transformers on the same folder, before and after, to
1e-5. The page's text stands in it already; the table between its two marks is made anew.

    python benchmarks/models.py            # all families, and writes the page
    python benchmarks/models.py e5 KaLM    # some, printed
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ultrarag import Encoder
from ultrarag.encoder import find_adapter
from ultrarag.errors import UsageError
from ultrarag.finetune import finetune
from ultrarag.retrieve import LiveIndex
from ultrarag.testing.layouts import LAYOUTS, Layout, write_layout
from ultrarag.testing.tiny import TEXTS
from ultrarag.testing.tiny_colbert import COLBERT_LAYOUTS, tiny_colbert
from ultrarag.types import Embeddings, Passage

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: python benchmarks/models.py -->", "<!-- end of table -->"
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
    lora: float
    #: each query's passage is scored in an index as by the vectors
    index: float
    #: the adapter that was chosen where none was named is the one that the layout says
    chosen: bool = True

    @property
    def sound(self) -> bool:
        return self.chosen and all(value <= TOLERANCE for value in (self.loaded, self.tuned, self.lora, self.index))


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


#: Late-interaction models by their layout, with a published model of each.
LATE = {f"late interaction, {layout}": layout for layout in COLBERT_LAYOUTS}
LATE_EXAMPLES = {"pylate": "lightonai/GTE-ModernColBERT-v1", "stanford": "colbert-ir/colbertv2.0"}


def run_late(layout: str, folder: Path) -> Outcome:
    """The same for a late-interaction model, against MultiVectorEncoder."""
    model = folder / "model"
    model.mkdir()
    tiny_colbert(model, layout)
    paths = [model]
    for name, more in {"tuned": {}, "lora": {"use_lora": True, "lora_rank": 4}}.items():
        paths.append(Path(finetune(str(model), ROWS, folder / name, **RUN, **more).checkpoint))
    encoders = [Encoder.load(path, device="cpu") for path in paths]
    found = [_late_difference(encoder, path) for encoder, path in zip(encoders, paths, strict=True)]
    index = _indexed(encoders[1], folder / "index", "colbert")
    return Outcome(*found, index=index, chosen=_chosen(model) == "colbert")


def _late_difference(encoder: Encoder, folder: Path) -> float:
    """The largest difference of a component of any token's vector; infinite where the tokens are others."""
    from sentence_transformers import MultiVectorEncoder

    library = MultiVectorEncoder(str(folder), device="cpu")
    found = []
    for kind, encode in (("query", library.encode_query), ("passage", library.encode_document)):
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
    wanted = encoder.similarity(*sides) if head == "dense" else _maxsim(*sides)
    with LiveIndex.create(folder, encoder) as index:
        index.add([Passage(str(number), text) for number, text in enumerate(PASSAGES)])
        off = [
            abs(hit.scores[head] - wanted[row, int(hit.id)])
            for row, query in enumerate(QUERIES)
            for hit in index.search(query, k=len(PASSAGES), weights={head: 1.0})
        ]
    return max(off) / max(1.0, float(np.abs(wanted).max()))


def _maxsim(query: Embeddings, passage: Embeddings) -> np.ndarray:
    """The mean over a query's tokens of the best product with any of a passage's, (queries, passages)."""
    rows = [
        [
            (tokens[mask.astype(bool)] @ held[kept.astype(bool)].T).max(1).mean()
            for held, kept in zip(passage.colbert, passage.mask, strict=True)
        ]
        for tokens, mask in zip(query.colbert, query.mask, strict=True)
    ]
    return np.array(rows)


def table(outcomes: dict[str, Outcome]) -> str:
    """The page's table, one line per family."""
    lines = [
        "| family | for example | adapter | chosen by itself | loaded | fine-tuned | LoRA | index |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        layout = LAYOUTS.get(name) or Layout("", adapter="colbert", example=LATE_EXAMPLES.get(LATE[name], ""))
        stages = [_word(value) for value in (outcome.loaded, outcome.tuned, outcome.lora, outcome.index)]
        example = f"`{layout.example}`" if layout.example else ""
        other = f"`{layout.chosen}`, which is equal too" if layout.chosen else "no: it has to be named"
        chosen = ("yes" if layout.chosen is None else other) if outcome.chosen else "another"
        lines.append(f"| {name} | {example} | `{layout.adapter}` | {chosen} | {' | '.join(stages)} |")
    return "\n".join(lines)


def _word(difference: float) -> str:
    return "equal" if difference <= TOLERANCE else f"off by {difference:.1g}"


def main() -> int:
    """Run the families, write or print the table; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all, and the page is written")
    known = [*LAYOUTS, *LATE]
    chosen = parser.parse_args().families or known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"no family '{unknown[0]}': it is one of {', '.join(known)}")
    outcomes = {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            outcomes[name] = run_late(LATE[name], path) if name in LATE else run(LAYOUTS[name], path)
        print(name, outcomes[name], file=sys.stderr)
    if chosen == known:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    else:
        print(table(outcomes))
    return 0 if all(outcome.sound for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
