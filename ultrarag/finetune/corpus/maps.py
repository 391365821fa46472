"""Maps: a linear map of one side's stored vectors, learned in seconds since nothing is encoded again.

A map is x -> normalize(x + A x + b). A and b begin at 0, so that it begins as the identity, and are drawn back to it by
`strength`. The negatives of a query are all stored passages. How strongly, how fast and for how many steps is found on
held-out queries whose documents training does not see: a split by query alone would promise gains that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultrarag.errors import TrainingError
from ultrarag.evaluation import ndcg_of_rows
from ultrarag.finetune.batches import Draws
from ultrarag.finetune.corpus.bank import Columns, draw_columns
from ultrarag.io import progress_bar
from ultrarag.losses import hide

#: Says that a stream of draws is this one: see the first numbers of the others in `plan.py`.
_MAPS = 5
#: What is tried, in this order; the first of equal worth is taken.
RATES = (3e-3, 1e-3)
STRENGTHS = (0.01, 0.1, 0.001)
#: Queries of a step, and steps between two looks at the held-out queries.
BATCH, LOOK = 128, 50
#: Passages that stand for the corpus at a step, weighted for all of them; the step's positives are always there.
COLUMNS = 2048
#: What the held-out metric must gain: less is not worth another model.
LEAST_GAIN = 0.002


class NoMap(TrainingError):
    """No map is worth having, or could be told to be; `reason` says why, without the flags of a command line."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason = reason


class ResidualMap(nn.Module):
    """x + A x + b, at unit length where `normalize` is set; A of low rank where `rank` is given."""

    def __init__(self, dim: int, normalize: bool = True, rank: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.normalize, self.rank = normalize, rank
        if rank is None:
            self.matrix = nn.Parameter(torch.zeros(dim, dim))
        else:  # A = left right: left is 0, so that the map is the identity, and right is not, so that left learns
            generator = torch.Generator().manual_seed(seed)
            self.left = nn.Parameter(torch.zeros(dim, rank))
            self.right = nn.Parameter(torch.randn(rank, dim, generator=generator) / dim**0.5)
        self.bias = nn.Parameter(torch.zeros(dim))

    def residual(self) -> Tensor:
        """A, (dim, dim)."""
        return self.matrix if self.rank is None else self.left @ self.right

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors, (n, dim)."""
        added = vectors @ self.matrix.T if self.rank is None else (vectors @ self.right.T) @ self.left.T
        mapped = vectors + added + self.bias
        return F.normalize(mapped, dim=-1) if self.normalize else mapped

    def distance(self) -> Tensor:
        """How far it is from the identity: the squares of A and b, summed."""
        return self.residual().square().sum() + self.bias.square().sum()

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """W = 1 + A, (dim, dim), and b, (dim,), both float32."""
        with torch.no_grad():
            found = torch.eye(len(self.bias), device=self.bias.device) + self.residual()
            return found.float().cpu().numpy(), self.bias.float().cpu().numpy()


@dataclass(frozen=True)
class MapSettings:
    """How maps are learned."""

    learning_rate: float = 1e-3
    #: weight of the squared distance from the identity in the loss
    strength: float = 0.01
    steps: int = 300
    rank: int | None = None
    temperature: float = 0.05
    seed: int = 42
    normalize: bool = True


@dataclass
class MapData:
    """Stored vectors, and which passages answer which query."""

    #: (queries, dim)
    queries: Tensor
    #: (passages, dim)
    passages: Tensor
    #: (pairs, 2) int64: query, passage; sorted by query, at least one for each query
    positives: np.ndarray

    def __post_init__(self) -> None:
        self.starts = np.searchsorted(self.positives[:, 0], np.arange(len(self.queries) + 1))

    def pairs_of(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positives of some queries: pairs (place in `queries`, passage), each (pairs,) int64."""
        counts = self.starts[queries + 1] - self.starts[queries]
        owner = np.repeat(np.arange(len(queries)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owner, self.positives[self.starts[queries][owner] + within, 1]

    def of(self, queries: np.ndarray) -> MapData:
        """The same passages with some of the queries."""
        chosen = self.queries[torch.as_tensor(queries, device=self.queries.device)]
        return MapData(chosen, self.passages, np.stack(self.pairs_of(queries), axis=1))


@dataclass
class Maps:
    """The maps of both sides; None: a side stays as it is."""

    query: ResidualMap | None = None
    passage: ResidualMap | None = None

    @classmethod
    def identity(cls, dim: int, query: bool, passage: bool, settings: MapSettings, device: torch.device) -> Maps:
        """Maps that change nothing yet."""

        def new(wanted: bool, side: int) -> ResidualMap | None:
            made = ResidualMap(dim, settings.normalize, settings.rank, settings.seed + side)
            return made.to(device) if wanted else None

        return cls(new(query, 0), new(passage, 1))

    @property
    def parts(self) -> list[ResidualMap]:
        """Those that there are."""
        return [part for part in (self.query, self.passage) if part is not None]

    def state(self) -> list[dict[str, Tensor]]:
        """A copy of all weights."""
        return [{name: value.detach().clone() for name, value in part.state_dict().items()} for part in self.parts]

    def restore(self, state: list[dict[str, Tensor]]) -> None:
        """Put weights back."""
        for part, held in zip(self.parts, state, strict=True):
            part.load_state_dict(held)

    def scores(self, queries: Tensor, passages: Tensor) -> Tensor:
        """Inner products after mapping, (queries, passages)."""
        left = self.query(queries) if self.query else queries
        right = self.passage(passages) if self.passage else passages
        return left @ right.T


def map_loss(
    maps: Maps, data: MapData, queries: np.ndarray, chosen: np.ndarray, settings: MapSettings, step: int
) -> Tensor:
    """InfoNCE of some queries against the corpus, plus what holds the maps to the identity.

    Args:
        queries: (batch,) their numbers.
        chosen: (batch,) the row of the positive of each; a query's other positives are no negatives.
        step: draws which passages stand for the corpus.
    """
    device = data.passages.device
    columns = Columns(np.arange(len(data.passages)))
    if len(data.passages) > COLUMNS:
        columns = draw_columns(len(data.passages), COLUMNS, chosen, settings.seed, step)
    passages = data.passages if columns.offsets is None else data.passages[torch.as_tensor(columns.rows, device=device)]
    scores = maps.scores(data.queries[torch.as_tensor(queries, device=device)], passages) / settings.temperature
    if columns.offsets is not None:
        scores = scores + torch.as_tensor(columns.offsets, device=device)
    owner, rows = data.pairs_of(queries)
    there, at = columns.places(rows)
    mask = np.zeros(tuple(scores.shape), bool)
    mask[owner[there], at] = True
    target = np.searchsorted(columns.rows, chosen)
    mask[np.arange(len(queries)), target] = False
    loss = F.cross_entropy(hide(scores, torch.from_numpy(mask).to(device)), torch.as_tensor(target, device=device))
    return loss + settings.strength * sum(part.distance() for part in maps.parts)


def learn(maps: Maps, data: MapData, settings: MapSettings) -> Iterator[int]:
    """Take `settings.steps` steps of Adam, its rate falling to 0 in a straight line; yield the steps done, each time.

    The batches are a pure function of the seed, so that the same call gives the same maps.
    """
    parameters = [parameter for part in maps.parts for parameter in part.parameters()]
    optimizer = torch.optim.Adam(parameters, settings.learning_rate)
    for step, queries in enumerate(_batches(len(data.queries), settings)):
        draws = Draws(_MAPS, settings.seed, 1, step)
        counts = data.starts[queries + 1] - data.starts[queries]
        chosen = data.positives[data.starts[queries] + draws.all_below(1 << 32, len(queries)) % counts, 1]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        optimizer.zero_grad()
        map_loss(maps, data, queries, chosen, settings, step).backward()
        optimizer.step()
        yield step + 1


def learned_map(
    data: MapData, sides: tuple[bool, bool], settings: MapSettings, device: torch.device
) -> tuple[Maps, float]:
    """The maps after `settings.steps` steps, and the loss of the last batch without what holds them back.

    Args:
        sides: whether the query side and the passage side have a map.
    """
    maps = Maps.identity(data.queries.shape[1], *sides, settings, device)
    with progress_bar(settings.steps, "learn the map", "step") as bar:
        for _ in learn(maps, data, settings):
            bar.update()
    queries = np.arange(min(BATCH, len(data.queries)))
    with torch.no_grad():
        chosen = data.positives[data.starts[queries], 1]
        return maps, float(map_loss(maps, data, queries, chosen, replace(settings, strength=0.0), settings.steps))


def _batches(count: int, settings: MapSettings) -> Iterator[np.ndarray]:
    size, epoch, rest = min(BATCH, count), 0, np.zeros(0, np.int64)
    for _ in range(settings.steps):
        if len(rest) < size:
            rest = Draws(_MAPS, settings.seed, 0, epoch).order(count)
            epoch += 1
        yield rest[:size]
        rest = rest[size:]


@torch.no_grad()
def ndcg(maps: Maps, data: MapData, k: int = 10) -> np.ndarray:
    """nDCG@k of each query among all passages, (queries,)."""
    found = []
    for start in range(0, len(data.queries), 256):
        scores = maps.scores(data.queries[start : start + 256], data.passages)
        rows = scores.topk(min(k, scores.shape[1]), dim=1).indices.cpu().numpy()
        for query, hits in enumerate(rows, start):
            relevant = data.positives[data.starts[query] : data.starts[query + 1], 1]
            found.append(ndcg_of_rows(hits, relevant, k))
    return np.array(found)


@dataclass
class Choice:
    """The settings found on held-out queries."""

    settings: MapSettings
    #: the metric of the held-out queries without maps, and with the best
    before: float
    after: float
    #: standard error of the difference, over queries
    error: float = 0.0
    #: each that was tried: learning_rate, strength, steps, metric
    tried: list[dict[str, float]] = field(default_factory=list)

    @property
    def gains(self) -> bool:
        """Whether maps are worth having: a difference above twice its error, since the best of many was taken."""
        return self.after - self.before >= max(LEAST_GAIN, 2 * self.error)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "gains": self.gains}


def choose_settings(
    data: MapData,
    held_out: MapData,
    sides: tuple[bool, bool],
    settings: MapSettings,
    rates: tuple[float, ...] = RATES,
    strengths: tuple[float, ...] = STRENGTHS,
    look: Callable[[int], object] | None = None,
) -> Choice:
    """Find the learning rate, then the strength and the number of steps, on held-out queries.

    Of all that were tried, those within one standard error of the best are as good; the one among them that is held
    hardest to the identity, with the fewest steps, forgets least of what the model knew.

    Args:
        data: what is trained on; shares no document with `held_out`.
        sides: whether the query side and the passage side have a map.
        look: told, at each look at the held-out queries, the steps since the last one.
    """
    dim, device = data.queries.shape[1], data.queries.device
    identity = Maps.identity(dim, False, False, settings, device)
    without = ndcg(identity, held_out)
    found = Choice(replace(settings, steps=0), float(without.mean()), float(without.mean()))
    trials: list[tuple[MapSettings, np.ndarray]] = []

    def attempt(rate: float, strength: float) -> None:
        trial = replace(settings, learning_rate=rate, strength=strength)
        maps = Maps.identity(dim, *sides, trial, device)
        for step in learn(maps, data, trial):
            if step % LOOK and step < trial.steps:
                continue
            each = ndcg(maps, held_out)
            value = float(each.mean())
            found.tried.append({"learning_rate": rate, "strength": strength, "steps": step, "metric": value})
            trials.append((replace(trial, steps=step), each))
            if look:
                look((step - 1) % LOOK + 1)

    for rate in rates:
        attempt(rate, strengths[0])
    best = max(trials, key=lambda trial: float(trial[1].mean()))[0].learning_rate
    for strength in strengths[1:]:
        attempt(best, strength)
    top = max((each for _, each in trials), key=lambda each: float(each.mean()))
    if float(top.mean()) > found.before:
        alike = [trial for trial in trials if _within_error(top, trial[1])]
        found.settings, each = max(alike, key=lambda trial: (trial[0].strength, -trial[0].steps))
        found.after, found.error = float(each.mean()), _error(each, without)
    return found


def _error(each: np.ndarray, other: np.ndarray) -> float:
    """The standard error of the mean difference, over queries."""
    return float((each - other).std() / len(each) ** 0.5)


def _within_error(best: np.ndarray, each: np.ndarray) -> bool:
    return float((best - each).mean()) <= _error(best, each)
