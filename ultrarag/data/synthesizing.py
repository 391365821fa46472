"""synthesize: queries for passages, by a language model or without one, kept where they find their passage."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.data.synthesize_client import (
    LETTER,
    BadAnswer,
    Endpoint,
    EndpointError,
    Prompt,
    language_of,
    read_queries,
)
from ultrarag.data.synthesize_journal import Journal, RoundTrip
from ultrarag.errors import DataError, UsageError
from ultrarag.io import Output, identity, progress_bar, resumable
from ultrarag.mining import pool_file, read_pool
from ultrarag.types import Passage

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder

#: Passages whose queries are searched together.
CHUNK_PASSAGES = 256
#: A sentence ends at a full stop before a space, or at a Chinese one.
_SENTENCE = re.compile(r".*?(?:[.!?](?=\s)|[。！？])", re.DOTALL)
#: Letters of the shortest first sentence: "Dr." is none.
_SHORTEST = 12


@dataclass(frozen=True)
class SynthesisSettings:
    """How queries are made; what is asked of the language model, and which of its queries are kept.

    Raises:
        UsageError: when a value cannot be used.
    """

    #: of a passage
    queries: int = 3
    #: which prompt of ours: en, zh, or auto, which looks at each passage
    language: str = "auto"
    #: a prompt in place of ours
    prompt_file: str | None = None
    #: times that a passage is asked about when answers hold no queries
    attempts: int = 3
    #: the first so many passages only
    limit: int | None = None
    #: keep a query when its passage is among the first k hits; None: keep all
    round_trip_k: int | None = None
    #: of the heads that search for the round trip; None: dense, or the model's only head
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "attempts", "limit", "round_trip_k"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")


@dataclass
class SynthesisReport:
    """What came of the passages, and what it cost."""

    passages: int = 0
    #: passages about which no answer held queries, or that the baseline cannot use
    without: int = 0
    queries: int = 0
    #: queries that did not find their passage
    dropped: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    #: answers for which the endpoint gave no numbers of tokens
    uncounted: int = 0

    def cost(self, price_in: float, price_out: float) -> float:
        """In the unit of prices per million tokens."""
        return (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))

    def __str__(self) -> str:
        parts = [f"{self.queries} queries for {self.passages} passages"]
        if self.dropped:
            parts.append(f"{self.dropped} more did not find their passage and were dropped")
        if self.without:
            parts.append(f"{self.without} passages have none")
        if self.tokens_in or self.tokens_out:
            parts.append(f"{self.tokens_in} tokens in and {self.tokens_out} out")
        if self.uncounted:
            parts.append(f"{self.uncounted} answers came without their number of tokens")
        return "; ".join(parts)


def synthesize(
    input_file: str | Path,
    output_file: str | Path,
    maker: Endpoint | str,
    settings: SynthesisSettings,
    *,
    encoder: Encoder | None = None,
    concurrency: int = 8,
    overwrite: bool = False,
    progress: bool | None = None,
) -> SynthesisReport:
    """Write rows of a query and its passage for the passages of a JSONL file or BEIR folder.

    Every answer of an endpoint is on the disk, in OUTPUT.answers.jsonl, before it counts; a killed call that is made
    again asks only for the others (at most `concurrency` answers were on their way). The answers stay, so that another
    round trip costs nothing.

    Args:
        maker: an endpoint, or the name of a baseline: title or first_sentence.
        encoder: searches for the round trip; None where BM25 alone does (weights={"bm25": 1}).

    Raises:
        DataError: a passage cannot be used, or the output exists or was begun with other arguments.
        EndpointError: the endpoint refuses or is gone.
    """
    output, source = Path(output_file), pool_file(input_file)
    made_by = _made_by(source, maker, settings)
    searched: dict[str, Any] = {"round_trip_k": settings.round_trip_k, "weights": dict(settings.weights or {})}
    searched["model"] = encoder.fingerprint if encoder else None
    folder = output.with_name(f"{output.name}.roundtrip")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        out = stack.enter_context(resumable(output, {**made_by, **searched}, overwrite))
        out.afterwards(lambda: shutil.rmtree(folder, ignore_errors=True))
        if out.finished:
            return SynthesisReport(**out.state)
        rows = _baseline_rows(source, maker, settings) if isinstance(maker, str) else None
        if rows is None:
            answers = output.with_name(f"{output.name}.answers.jsonl")
            journal = stack.enter_context(closing(Journal(answers, made_by, overwrite)))
            asyncio.run(_ask_all(source, maker, settings, journal, concurrency, progress))  # type: ignore[arg-type]
            rows = _answered_rows(source, settings, journal)
        trip = None
        if settings.round_trip_k:
            trip = stack.enter_context(RoundTrip(folder, source, encoder, settings.weights, settings.round_trip_k))
        return _write(out, rows, trip, progress)


@dataclass(frozen=True)
class Made:
    """What was made of one passage: rows, or none, and what the answers took."""

    passage: Passage
    #: (query, positive)
    pairs: list[tuple[str, str]]
    record: Mapping[str, Any]


def _made_by(source: Path, maker: Endpoint | str, settings: SynthesisSettings) -> dict[str, Any]:
    """What the answers depend on; how long the client waits does not matter."""
    made: dict[str, Any] = {"input": identity(source), "limit": settings.limit}
    if isinstance(maker, str):
        return {**made, "baseline": maker}
    prompt = Prompt(settings.language, settings.prompt_file)
    wanted = {key: value for key, value in asdict(settings).items() if key in ("queries", "attempts")}
    return {**made, "model": maker.model, "body": dict(maker.body or {}), "prompt": prompt.texts, **wanted}


def _passages(source: Path, limit: int | None) -> Iterator[tuple[int, Passage]]:
    return islice(enumerate(read_pool(source)), limit)


async def _ask_all(
    source: Path,
    endpoint: Endpoint,
    settings: SynthesisSettings,
    journal: Journal,
    concurrency: int,
    progress: bool | None,
) -> None:
    """Ask about all passages without an answer, several at a time; an error lets the others' answers arrive first."""
    prompt, errors = Prompt(settings.language, settings.prompt_file), list[EndpointError]()
    total = sum(1 for _ in _passages(source, settings.limit))
    waiting = ((number, passage) for number, passage in _passages(source, settings.limit) if number not in journal)

    async def work() -> None:
        for number, passage in waiting:
            if errors:
                return
            try:
                record = await _ask(endpoint, prompt.render(passage, settings.queries), settings)
            except EndpointError as error:
                errors.append(error)
                return
            journal.add(number, record)
            bar.update(1)

    with progress_bar(total, "ask", "passage", progress) as bar:
        bar.update(journal.records)
        async with endpoint:
            await asyncio.gather(*(work() for _ in range(concurrency)))
    if errors:
        raise errors[0]


async def _ask(endpoint: Endpoint, prompt: str, settings: SynthesisSettings) -> dict[str, Any]:
    """Ask until an answer holds queries; every answer's tokens count."""
    record: dict[str, Any] = {"in": 0, "out": 0, "uncounted": 0}
    for _ in range(settings.attempts):
        answer = await endpoint.ask(prompt)
        record["in"] += answer.tokens_in or 0
        record["out"] += answer.tokens_out or 0
        record["uncounted"] += answer.tokens_in is None
        try:
            return {**record, "queries": read_queries(answer.text, settings.queries)}
        except BadAnswer as error:
            record["error"] = f"{error} (it was cut: raise --max_tokens)" if answer.cut else str(error)
    return record


def _answered_rows(source: Path, settings: SynthesisSettings, journal: Journal) -> Iterator[Made]:
    for number, passage in _passages(source, settings.limit):
        record = journal.get(number) or {}
        yield Made(passage, [(query, passage.content) for query in record.get("queries", ())], record)


def _baseline_rows(source: Path, name: str, settings: SynthesisSettings) -> Iterator[Made]:
    make = baseline(name)
    for _, passage in _passages(source, settings.limit):
        pair = make(passage)
        yield Made(passage, [] if pair is None else [pair], {})


def _write(out: Output, rows: Iterator[Made], trip: RoundTrip | None, progress: bool | None) -> SynthesisReport:
    report = SynthesisReport(**out.state)
    todo = islice(rows, out.done, None)
    with progress_bar(None, "write", "passage", progress) as bar:
        while chunk := list(islice(todo, CHUNK_PASSAGES)):
            asked = [(query, made.passage.content) for made in chunk for query, _ in made.pairs]
            kept = iter(trip.keeps(asked) if trip else [True] * len(asked))
            for made in chunk:
                _write_one(out, made, [next(kept) for _ in made.pairs], report)
            out.state = report.to_dict()
            out.advance(len(chunk))
            bar.update(len(chunk))
    return report


def _write_one(out: Output, made: Made, kept: list[bool], report: SynthesisReport) -> None:
    report.passages += 1
    report.without += not made.pairs
    report.queries += sum(kept)
    report.dropped += len(kept) - sum(kept)
    report.tokens_in += made.record.get("in", 0)
    report.tokens_out += made.record.get("out", 0)
    report.uncounted += made.record.get("uncounted", 0)
    known = {"passage_id": made.passage.id} if made.passage.id else {}
    for (query, positive), keep in zip(made.pairs, kept, strict=True):
        if keep:
            out.write({"query": query, "pos": [positive], **known})


def by_title(passage: Passage) -> tuple[str, str] | None:
    """The title as the query of the text below it; None where one of them is missing."""
    title, text = " ".join(passage.title.split()), passage.text.strip()
    return (title, text) if title and text else None


def by_first_sentence(passage: Passage) -> tuple[str, str] | None:
    """The first sentence as the query of the rest; None for a text of one sentence."""
    text = passage.text.strip()
    for found in _SENTENCE.finditer(text):
        first, rest = text[: found.end()].strip(), text[found.end() :].strip()
        if rest and len(LETTER.findall(first)) >= (_SHORTEST if language_of(first) == "en" else _SHORTEST // 2):
            return " ".join(first.split()), Passage("", rest, passage.title).content
    return None


#: name -> (passage -> its query and what is left of it as the positive), without a language model
BASELINES: dict[str, Callable[[Passage], tuple[str, str] | None]] = {
    "title": by_title,
    "first_sentence": by_first_sentence,
}


def baseline(name: str) -> Callable[[Passage], tuple[str, str] | None]:
    """The baseline with this name."""
    if name not in BASELINES:
        raise DataError(f"'{name}' is no baseline; there are {', '.join(BASELINES)}")
    return BASELINES[name]
