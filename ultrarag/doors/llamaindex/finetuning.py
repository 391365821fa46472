"""Fine-tuning engine: LlamaIndex's questions about its nodes refresh the live index that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrarag.doors import Source, opened
from ultrarag.doors.llamaindex.embedding import UltraRAGEmbedding
from ultrarag.errors import DataError, UsageError
from ultrarag.retrieve import LiveIndex, RefreshReport

Row = dict[str, Any]


class UltraRAGFinetuneEngine:
    """Fine-tunes the encoder of a live index, and swaps the new one in: LlamaIndex's `finetune`, `get_finetuned_model`.

    The index answers meanwhile; then every store, embedding and retriever over it is the new model's.

    Args:
        dataset: an EmbeddingQAFinetuneDataset, its JSON file, or a mapping with its three fields: `queries` (id ->
            question), `corpus` (id -> text) and `relevant_docs` (question id -> ids of the corpus). Or anything that
            `LiveIndex.refresh` takes as training data, such as "feedback".
        source: the `LiveIndex`, or the folder of one.
        model_output_path: a new folder, for the checkpoint and the report.
        val_dataset: of the same forms. The new model goes live only if it is not significantly worse on it: on the
            index where its nodes are there, else on its own corpus. Default: nothing is asked of it.
        refresh: other arguments of `LiveIndex.refresh` and of fine-tuning, such as effort="auto", learning_rate=2e-5.

    Example:
        >>> engine = UltraRAGFinetuneEngine(train_dataset, live, val_dataset=val_dataset)
        >>> engine.finetune()
        >>> embed_model = engine.get_finetuned_model()
    """

    def __init__(
        self,
        dataset: Any,
        source: Source,
        model_output_path: str | os.PathLike[str] = "exp_finetune",
        *,
        val_dataset: Any = None,
        batch_size: int = 10,
        epochs: int = 2,
        **refresh: Any,
    ) -> None:
        self._live = opened(source)
        self._output = Path(model_output_path)
        self._train = training_rows(self._live, dataset)
        self._judged = {} if val_dataset is None else judged_by(self._live, val_dataset)
        self._arguments = {"per_device_train_batch_size": batch_size, "num_train_epochs": epochs, **refresh}
        self.report: RefreshReport | None = None

    def finetune(self, **train_kwargs: Any) -> RefreshReport:
        """Fine-tune, build, gate and swap; after a crash the same call goes on where it was.

        Args:
            train_kwargs: in place of those of the engine.

        Raises:
            GateError: the new model is significantly worse; the old one stays live.
            DataError, UsageError, TrainingError: as for `LiveIndex.refresh`.
        """
        arguments = {**self._judged, **self._arguments, **train_kwargs}
        self.report = self._live.refresh(self._train, output_dir=self._output, **arguments)
        return self.report

    def get_finetuned_model(self, **model_kwargs: Any) -> UltraRAGEmbedding:
        """The embedding model of the index, which is now the fine-tuned one."""
        if self.report is None:
            raise UsageError("there is no fine-tuned model yet: call finetune()")
        return UltraRAGEmbedding(self._live, **model_kwargs)


def training_rows(live: LiveIndex, dataset: Any) -> Any:
    """The questions as training rows; what is no data set of questions is returned as it is.

    Raises:
        DataError: a question without a text of the corpus; names it.
    """
    if (fields := _fields(dataset)) is None:
        return dataset
    queries, corpus, relevant = fields
    texts = {**corpus, **{id: passage.content for id, passage in live.get_many(corpus).items()}}
    return [
        {"query": query, "pos": [texts[id] for id in _answers(relevant, corpus, id)]} for id, query in queries.items()
    ]


def judged_by(live: LiveIndex, dataset: Any) -> dict[str, Any]:
    """The arguments of a refresh that is judged by these questions."""
    if (fields := _fields(dataset)) is None:
        return {"eval_data": dataset}
    queries, corpus, relevant = fields
    answers = {id: _answers(relevant, corpus, id) for id in queries}
    wanted = {answer for ids in answers.values() for answer in ids}
    if live.existing(wanted) == wanted:
        return {"gate": (dict(queries), {id: dict.fromkeys(ids, 1) for id, ids in answers.items()})}
    return {"eval_data": training_rows(live, dataset)}


def _answers(relevant: Mapping[str, Sequence[str]], corpus: Mapping[str, str], query: str) -> Sequence[str]:
    ids = relevant.get(query) or []
    if not ids:
        raise DataError(f"dataset: question '{query}' has no relevant_docs; leave it out, or name one")
    if missing := [id for id in ids if id not in corpus]:
        raise DataError(f"dataset: question '{query}' names '{missing[0]}', which its corpus does not have")
    return ids


def _fields(dataset: Any) -> tuple[Mapping[str, str], Mapping[str, str], Mapping[str, Sequence[str]]] | None:
    """Queries, corpus and relevant documents of what is a data set of questions."""
    if isinstance(dataset, str | os.PathLike) and Path(dataset).suffix == ".json":
        try:
            held = json.loads(Path(dataset).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"dataset '{dataset}' cannot be read as JSON: {error}") from error
        dataset = held if isinstance(held, dict) else dataset
    names = ("queries", "corpus", "relevant_docs")
    get = dataset.get if isinstance(dataset, Mapping) else lambda name: getattr(dataset, name, None)
    found = [get(name) for name in names]
    if all(part is None for part in found):
        return None
    for name, part in zip(names, found, strict=True):
        if not isinstance(part, Mapping) or not part:
            raise DataError(f"dataset: '{name}' is missing or empty; it has {', '.join(names)}")
    if (mode := get("mode")) not in (None, "text"):
        raise DataError(f"dataset: its mode is '{mode}'; texts alone are trained on")
    queries, corpus, relevant = (dict(part) for part in found)  # type: ignore[arg-type]
    return queries, corpus, relevant
