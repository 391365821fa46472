"""Against: what a run needs to train one side of a model, or a map, against the stored vectors of a corpus."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ultrarag.checkpoint import read_manifest
from ultrarag.encode import CorpusVectors
from ultrarag.encoder import Encoder
from ultrarag.errors import UsageError
from ultrarag.finetune.batches import TrainData
from ultrarag.finetune.corpus import (
    RATES,
    STRENGTHS,
    Bank,
    Choice,
    CorpusNegatives,
    FrozenQueries,
    Known,
    MapData,
    MapSettings,
    Nearest,
    NoMap,
    choose_settings,
    encode_asked,
    keys_of,
    learned_map,
)
from ultrarag.finetune.flags import FinetuneArguments
from ultrarag.finetune.step import encode_by_ranks
from ultrarag.io import progress_bar
from ultrarag.maps import LinearMap
from ultrarag.rows.checks import DocumentGroups, hold_out
from ultrarag.types import Embeddings, Example, Passage, text_of

#: Passages that a map is learned on, where the corpus has more: all positives, and others at random.
MAP_PASSAGES = 100_000
#: Fewer held-out queries than this cannot choose anything.
FEWEST_HELD_OUT = 10
#: The share of the rows that is held out, and how many at most.
HELD_OUT, MOST_HELD_OUT = 0.1, 400


def held_out_rows(rows: Sequence[Example], seed: int) -> np.ndarray:
    """Which rows choose settings, with their documents: a tenth, `MOST_HELD_OUT` at most; (rows,) bool."""
    groups = DocumentGroups()
    for row in rows:
        groups.add(row.query, row.pos)
    share = min(HELD_OUT, MOST_HELD_OUT / len(rows))
    return hold_out(groups.joined().roots(), {"held out": share}, seed) > 0


def two_sides(parent: Encoder, arguments: FinetuneArguments) -> Encoder:
    """The encoder to train: the parent itself, or one of two sides of which one is a copy of the parent's."""
    sides = arguments.sides
    if sides.train_side == "both" or sides.maps_alone:
        return parent
    trained = parent.around(copy.deepcopy(parent.model))
    if sides.train_side == "passage":
        return Encoder.of_sides(trained, parent)
    if not sides.passage_map:
        return Encoder.of_sides(parent, trained)
    return Encoder.of_sides(parent, trained, passage_maps=[LinearMap.identity(_dim(parent), _normalizes(parent))])


def _dim(parent: Encoder) -> int:
    if parent.dim is None:
        raise UsageError(
            f"a linear map is of dense vectors, and the model has {', '.join(parent.heads)}: leave the map out"
        )
    return parent.dim


def _normalizes(encoder: Encoder) -> bool:
    return encoder.settings.normalize is not False


@dataclass
class Against:
    """The corpus of a run, and what is learned against it.

    Everything that can be refused is refused by `of`; nothing is encoded before `prepare`.
    """

    arguments: FinetuneArguments
    #: the model as it is before training
    parent: Encoder
    #: the heads in training
    heads: tuple[str, ...]
    parts: Sequence[TrainData]
    vectors: CorpusVectors | None
    note: Callable[[str], None]
    negatives: CorpusNegatives | None = None
    #: what was found on held-out documents
    choice: Choice | None = None
    _asked: list[tuple[str, str | None]] = field(default_factory=list, repr=False)
    #: head -> stored vectors, and those of held-out passages that are not in the corpus
    _held_out: dict[str, Bank] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        arguments: FinetuneArguments,
        parent: Encoder,
        heads: tuple[str, ...],
        parts: Sequence[TrainData],
        note: Callable[[str], None],
    ) -> Against | None:
        """What the run's flags ask for; None where both sides are trained on their batches.

        Raises:
            UsageError, DataError, FingerprintError: the corpus is not this model's, or the rows do not suit.
        """
        sides = arguments.sides
        if not sides.used:
            return None
        symmetric = [item.name for part in parts for item in part.datasets if item.type.startswith("symmetric")]
        if symmetric:
            raise UsageError(
                f"dataset '{symmetric[0]}' is of a symmetric task, whose passages are read as queries: it has no "
                "passage side; train both sides, without --corpus"
            )
        if sides.query_map or sides.passage_map:
            _dim(parent)
            heads = ("dense",) if sides.maps_alone else heads
            if "dense" not in heads:
                raise UsageError("a linear map is of dense vectors, which are not in --heads: add dense")
        given = sides.corpus
        vectors = CorpusVectors.open(given) if isinstance(given, str) else given
        if vectors is not None:
            if not isinstance(vectors, CorpusVectors):
                raise UsageError(f"corpus is a {type(vectors).__name__}; it must be a folder, or CorpusVectors")
            vectors.check(parent, heads)
        return cls(arguments, parent, heads, parts, vectors, note)

    def describe(self) -> dict[str, Any]:
        """What the record of the run says of it, as plain JSON values."""
        found = self.arguments.sides.to_dict()
        if self.vectors is not None:
            digest = hashlib.sha256(np.ascontiguousarray(self.vectors.keys).tobytes()).hexdigest()
            found["corpus"] = {
                "passages": len(self.vectors),
                "passage_fingerprint": self.vectors.fingerprint,
                "sha256": digest,
            }
        return found | ({"found": self.choice.to_dict()} if self.choice else {})

    # ---- what is encoded once

    @property
    def keeps_passages(self) -> bool:
        """Whether stored vectors stay what they are, but for a map."""
        return self.arguments.sides.still == "passage" or self.arguments.sides.maps_alone

    def prepare(self, encoder: Encoder, resume: Path | None) -> None:
        """Encode once what the frozen side has to, and choose the settings of a map.

        Args:
            encoder: what is trained, as `two_sides` made it.

        Raises:
            NoMap: too few rows can be held out to choose a map; or it gains nothing, and it was required.
        """
        sides = self.arguments.sides
        texts = list(dict.fromkeys(text for row in self.rows() for text in chain(row.pos, row.neg)))
        vectors = self.vectors
        if vectors is None and self.keeps_passages:
            keys, first = np.unique(keys_of(texts), return_index=True)
            chosen = [texts[place] for place in sorted(first)]
            encoded = self.encode_passages(chosen)
            keys = keys_of(chosen)
            vectors = CorpusVectors(
                self.parent.passage_fingerprint,
                [f"row-passage-{number}" for number in range(len(chosen))],
                np.stack([keys, keys], axis=1),
                encoded.dense,
                others=lambda rows, asked: _only(encoded[rows], asked),
                heads=self.heads,
            )
            self.note(f"no --corpus: the {len(chosen)} passages of the training rows are the negatives")
        if vectors is not None:
            bank = Bank(vectors, self.heads, self.parent.device)
            if self.keeps_passages and (more := bank.add(texts, self.encode_passages)):
                self.note(f"{more} passages of the training rows are not in the corpus: encoded once")
            count = CorpusNegatives.size(bank, sides.corpus_negatives)
            frozen: Any = sides.still
            seed = self.arguments.training.seed
            self.negatives = CorpusNegatives(bank, Known(self.parts), frozen, seed, count)
            self._tell_size(bank, count)
        if sides.frozen == "query":
            self._freeze_queries()
        if sides.maps_alone or sides.passage_map:
            self._choose(resume)
        if sides.passage_map and not sides.maps_alone:
            self._put_map(encoder)

    def rows(self) -> Iterator[Example]:
        """All training rows."""
        return (part[number] for part in self.parts for number in range(len(part)))

    def encode_passages(self, texts: list[str]) -> Embeddings:
        """Encode passages as the model does before training, each rank its share."""
        return encode_by_ranks(texts, lambda mine: self.parent.encode(mine, "passage", heads=self.heads))

    def encode_queries(self, encoder: Encoder, heads: tuple[str, ...]) -> Embeddings:
        """Encode the queries of all rows, each rank its share."""
        length = self.arguments.data.query_max_len

        def encode(texts: list[str], prompt: str | None) -> Embeddings:
            def part(mine: list[str]) -> Embeddings:
                return encoder.encode(mine, "query", heads=heads, max_length=length, instruction=prompt)

            return encode_by_ranks(texts, part)

        return encode_asked(self.asked, encode)

    @property
    def asked(self) -> list[tuple[str, str | None]]:
        """The queries of all rows, with their own instructions."""
        if not self._asked:
            self._asked = [(row.query, row.prompt) for row in self.rows()]
        return self._asked

    def _freeze_queries(self) -> None:
        if self.negatives is None:
            return
        vectors = self.encode_queries(self.parent, self.heads)
        numbers: dict[tuple[str, str | None], int] = {}
        for number, item in enumerate(self.asked):
            numbers.setdefault(item, number)
        self.negatives.queries = FrozenQueries(numbers, vectors)

    def _tell_size(self, bank: Bank, count: int | None) -> None:
        if self.arguments.sides.maps_alone:
            return
        kind = "stored" if self.arguments.sides.still == "passage" else "stored (stale)"
        which = "all" if count is None else f"about {count} (the nearest, and a weighted sample)"
        self.note(f"negatives: {which} of the {len(bank)} {kind} passages at each step")

    def stored(self, encoder: Encoder, texts: Sequence[str | Passage], head: str) -> Embeddings:
        """Held-out passages as an index that keeps its vectors has them: stored, or encoded once, then mapped."""
        assert self.negatives is not None
        bank = self._held_out.get(head)
        if bank is None:
            vectors, cpu = self.negatives.bank.vectors, torch.device("cpu")
            bank = self._held_out[head] = Bank(vectors, (head,), cpu)

        def encode(mine: list[str | Passage]) -> Embeddings:
            return encode_by_ranks(mine, lambda part: self.parent.encode(part, "passage", heads=(head,)))

        bank.add(texts, encode)
        found = bank.read(bank.row_of(keys_of(map(text_of, texts)))).numpy()
        for item in encoder.passage_maps[len(self.parent.passage_maps) :]:
            if item.head == head == "dense":
                found.dense = item.apply(found.dense)
        return found

    def mine(self, encoder: Encoder) -> Nearest:
        """The passages nearest to each training query, with the encoder as it is."""
        assert self.negatives is not None
        head = (self.negatives.mined_by,)
        frozen = self.negatives.queries
        vectors = self.encode_queries(encoder if frozen is None else self.parent, head)
        return self.negatives.mine(self.asked, vectors)

    @property
    def map_rate(self) -> float:
        """Learning rate of a map that is trained beside the query side."""
        return self.choice.settings.learning_rate if self.choice else 0.0

    # ---- maps

    def map_settings(self) -> MapSettings:
        """What the flags say of maps; what they leave open is chosen."""
        sides = self.arguments.sides
        return MapSettings(
            learning_rate=sides.map_learning_rate or MapSettings.learning_rate,
            strength=MapSettings.strength if sides.map_regularization is None else sides.map_regularization,
            steps=sides.map_steps,
            rank=sides.map_rank,
            temperature=self.arguments.loss.temperature,
            seed=self.arguments.training.seed,
            normalize=_normalizes(self.parent),
        )

    def _map_data(self) -> MapData:
        assert self.negatives is not None
        bank = self.negatives.bank
        vectors = self.encode_queries(self.parent, ("dense",)).dense
        pairs = [(number, key) for number, row in enumerate(self.rows()) for key in keys_of(row.pos).tolist()]
        owner, keys = np.array(pairs, np.int64).T
        places, rows = bank.rows_of(keys)
        chosen = np.arange(len(bank))
        if len(bank) > MAP_PASSAGES:
            generator = np.random.Generator(np.random.Philox(self.arguments.training.seed))
            chosen = np.union1d(rows, generator.choice(len(bank), MAP_PASSAGES, replace=False))
        positives = np.unique(np.stack([owner[places], np.searchsorted(chosen, rows)], axis=1), axis=0)
        passages = bank.read(chosen).dense
        return MapData(torch.as_tensor(vectors, device=bank.device), passages, positives)

    def _choose(self, resume: Path | None) -> None:
        """Find the maps' settings on held-out documents, or take those of the run that is resumed."""
        sides = self.arguments.sides
        self._data = self._map_data()
        rows = list(self.rows())
        held = held_out_rows(rows, self.arguments.training.seed)
        if held.sum() < FEWEST_HELD_OUT:
            raise NoMap(
                f"of {len(rows)} rows only {int(held.sum())} can be held out with their documents, too few to say "
                f"whether a map gains (at least {FEWEST_HELD_OUT})",
                "give more rows, or train without a map",
            )
        if resume is not None and (earlier := _found(resume)):
            self.choice = earlier
            return
        wanted = self.map_settings()
        rates = RATES if sides.map_learning_rate is None else (wanted.learning_rate,)
        strengths = STRENGTHS if sides.map_regularization is None else (wanted.strength,)
        # with an encoder in training, a map of its queries stands for it
        which = (sides.train_side == "query", sides.passage_map is not None)
        data = self._data.of(np.flatnonzero(~held)), self._data.of(np.flatnonzero(held))
        trials = wanted.steps * (len(rates) + len(strengths) - 1)
        with progress_bar(trials, "choose the map", "step") as bar:
            self.choice = choose_settings(*data, which, wanted, rates, strengths, bar.update)
        found = self.choice
        self.note(
            f"map: nDCG@10 on {int(held.sum())} held-out queries of other documents {found.before:.4f} -> "
            f"{found.after:.4f} (learning rate {found.settings.learning_rate:g}, regularisation "
            f"{found.settings.strength:g}, {found.settings.steps} steps)"
        )

    def _put_map(self, encoder: Encoder) -> None:
        """Have the encoder's last passage map trained; one that gains nothing on held-out documents is taken away."""
        assert self.negatives is not None
        assert self.choice is not None
        layers = cast(Any, encoder.model).passage_maps
        if not self.choice.gains and self.arguments.sides.require_map:
            raise NoMap(
                f"the passage map gains nothing on held-out queries of other documents (nDCG@10 "
                f"{self.choice.before:.4f} without, {self.choice.after:.4f} with the best), and without it this is the "
                f"training of the query side alone",
                "leave --require_map out, or --passage_map",
            )
        if not self.choice.gains:
            self.note("the passage map gains nothing on held-out documents: it is left out, and stored vectors stay")
            del layers[-1]
            return
        layer = layers[-1]
        layer.requires_grad_(True)
        self.negatives.map, self.negatives.strength = layer, self.choice.settings.strength

    def learn_maps(self) -> tuple[Encoder, float]:
        """Learn the maps on all rows, with what was found on held-out ones; the encoder that has them, and the loss.

        Raises:
            NoMap: no map gained anything on held-out documents.
        """
        assert self.choice is not None
        if not self.choice.gains:
            raise NoMap(
                f"no map gains anything on held-out queries of other documents (nDCG@10 {self.choice.before:.4f} "
                f"without, {self.choice.after:.4f} with the best), so no checkpoint is written",
                "train the query side's encoder (--train_side query without --query_map), or both sides",
            )
        sides, settings = self.arguments.sides, self.choice.settings
        maps, loss = learned_map(
            self._data, (sides.query_map is not None, sides.passage_map is not None), settings, self.parent.device
        )
        found = [
            [LinearMap(*part.weights(), normalize=settings.normalize)] if part is not None else []
            for part in (maps.query, maps.passage)
        ]
        return Encoder.of_sides(self.parent, query_maps=found[0], passage_maps=found[1]), loss


def _only(embeddings: Embeddings, heads: Sequence[str]) -> Embeddings:
    kept: dict[str, Any] = {head: getattr(embeddings, head) for head in heads}
    return Embeddings(**kept, mask=embeddings.mask if "colbert" in heads else None)


def _found(resume: Path) -> Choice | None:
    """What the run that is resumed had found on held-out documents."""
    manifest = read_manifest(resume)
    if manifest is None or manifest.training is None:
        return None
    found = dict(manifest.training.arguments.get("sides", {})).get("found")
    if found is None:
        return None
    return Choice(MapSettings(**found["settings"]), found["before"], found["after"], found["error"], found["tried"])
