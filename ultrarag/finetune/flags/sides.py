"""SideArguments: which side of a model is trained, or which linear map, and against the vectors of which corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ultrarag.errors import UsageError
from ultrarag.loss_arguments import flag

SIDES = ("both", "query", "passage")
LINEAR = ("linear",)
#: Of a model of two sides, the one beside another.
OTHER_SIDE = {"query": "passage", "passage": "query"}


@dataclass
class SideArguments:
    """Training of one side, and against stored vectors.

    Raises:
        UsageError: when values do not go together.
    """

    train_side: str = flag(
        "both",
        "What is trained: both sides, which are one model; query: passages are encoded as before, so that an index "
        "keeps its vectors; passage: queries are.",
        choices=SIDES,
    )
    query_map: str | None = flag(
        None,
        "linear: learn a linear map of the query vectors, and leave the encoder as it is. Takes seconds.",
        choices=LINEAR,
    )
    passage_map: str | None = flag(
        None,
        "linear: learn a linear map of the passage vectors, by which stored ones are mapped without encoding. Its "
        "regularisation is the strongest that costs nothing on queries whose documents training does not see; it is "
        "left out where it gains nothing there.",
        choices=LINEAR,
    )
    require_map: bool = flag(
        False,
        "Refuse, before anything is trained, where the passage map gains nothing on queries whose documents training "
        "does not see. Without this the query side is trained alone there.",
    )
    corpus: Any = flag(  # noqa: RUF009 - a field
        None,
        "The stored vectors of all passages, which are then the negatives of every query: a folder that `ultrarag data "
        "encode` wrote with the model as it is before training (in Python also CorpusVectors).",
        kind="path_or_object",
        metavar="DIR",
        shown_default="with a frozen passage side, the passages of the training rows",
    )
    corpus_negatives: int | None = flag(
        None,
        "How many passages of the corpus stand against each step's queries: the nearest to them when the epoch began, "
        "the others a sample that is weighted for all.",
        shown_default="all, up to 100,000 passages; above that 8192; with ColBERT 1024",
    )
    map_learning_rate: float | None = flag(
        None, "Learning rate of the maps.", shown_default="found on held-out documents"
    )
    map_regularization: float | None = flag(
        None,
        "Weight, in the loss, of a map's squared distance from the identity.",
        shown_default="found on held-out documents",
    )
    map_rank: int | None = flag(
        None, "Rank of what a map adds to the identity (query_map, or a map alone).", shown_default="full"
    )
    map_steps: int = flag(200, "Most steps of a map that is learned alone; how many is found on held-out documents.")

    def __post_init__(self) -> None:
        for name, allowed in (("train_side", SIDES), ("query_map", LINEAR), ("passage_map", LINEAR)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UsageError(f"{name} is '{value}'; it must be one of {', '.join(allowed)}")
        for name in ("corpus_negatives", "map_rank", "map_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        for name, least in (("map_learning_rate", 0.0), ("map_regularization", 0.0)):
            value = getattr(self, name)
            if value is not None and not (least <= value < float("inf")):
                raise UsageError(f"{name} is {value}; it must be a number of at least {least:g}")
        if self.map_learning_rate == 0:
            raise UsageError("map_learning_rate is 0; it must be above 0")
        self._check_maps()

    def _check_maps(self) -> None:
        if self.query_map and self.train_side != "query":
            raise UsageError(f"query_map is a way of training the query side: give --train_side query, not {self}")
        if self.passage_map and self.train_side == "both":
            raise UsageError(
                "passage_map maps stored vectors, which --train_side both would encode anew: give --train_side query "
                "(with a trained query side), or --train_side passage (the map alone)"
            )
        if not (self.query_map or self.passage_map):
            for name in ("map_learning_rate", "map_regularization", "map_rank"):
                if getattr(self, name) is not None:
                    raise UsageError(f"{name} has no effect without --query_map or --passage_map")
            if self.require_map:
                raise UsageError("require_map has no effect without --query_map or --passage_map")

    def __str__(self) -> str:
        return self.train_side

    @property
    def maps_alone(self) -> bool:
        """No encoder is trained: the maps of stored vectors are all that learns."""
        return self.query_map is not None or (self.train_side == "passage" and self.passage_map is not None)

    @property
    def still(self) -> str | None:
        """The side whose texts keep their vectors, but for a map; None where both are trained."""
        return OTHER_SIDE.get(self.train_side)

    @property
    def frozen(self) -> str | None:
        """The side of the encoder that stays as it is while the other one is trained."""
        return None if self.maps_alone else self.still

    @property
    def used(self) -> bool:
        """Whether the run differs from one that trains both sides on its batches."""
        return self.train_side != "both" or self.corpus is not None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; vectors given in Python are only named."""
        values = dict(vars(self))
        values["corpus"] = self.corpus if isinstance(self.corpus, str | None) else "given"
        return values
