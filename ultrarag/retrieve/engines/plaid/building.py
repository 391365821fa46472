"""What is made of rows that are there: the same rows anew, coded where they were not, and their lists."""

from __future__ import annotations

import numpy as np

from ultrarag.retrieve.engines.ivf import Table
from ultrarag.retrieve.engines.plaid.clusters import Centroids
from ultrarag.retrieve.engines.plaid.coder import SAMPLE, Coder
from ultrarag.retrieve.engines.plaid.lists import Lists
from ultrarag.retrieve.engines.plaid.tokens import Tokens

#: Tokens for each list, about, and lists at most.
LIST_TOKENS, MOST_LISTS = 256, 32_768
#: Tokens of the sample for each list.
SAMPLE_TOKENS = 24


def rewritten(table: Table, tokens: Tokens, bits: int | None, rest: int) -> tuple[Table, Tokens]:
    """The living rows in files of the next number; `bits`: as codes of so many, where they are not coded yet, with a
    refinement of `rest` bits.

    An error of the disk leaves no table and no tokens open.
    """
    alive, state = np.flatnonzero(table.alive()), {"number": table.number + 1}
    coder = tokens.coder if isinstance(tokens.coder, Coder) else None
    if coder is None and bits is not None:
        coder = Coder.train(bits, _sample(tokens, alive, SAMPLE), rest)
    new = Table(table.folder, 0, state)
    try:
        held = Tokens(table.folder, tokens.coder.dim, state, coder=coder)
        try:
            for rows in tokens.blocks(alive):
                codes, counts = tokens.read(rows, whole=True)
                if held.coder.size != tokens.coder.size:
                    codes = held.coder.encode(tokens.coder.decode(codes))
                sizes = held.write(np.split(codes, np.cumsum(counts)[:-1]))
                ids, found = [table.id_of(row) for row in rows.tolist()], [table.facts_of(row) for row in rows.tolist()]
                new.append(ids, found, np.zeros((len(rows), 0), np.float32))
                held.append(sizes, tokens.norm)
        except BaseException:
            held.close()
            raise
    except BaseException:
        new.close()
        raise
    return new, held


def listed(tokens: Tokens, alive: np.ndarray) -> Lists | None:
    """Lists of all rows, around centroids chosen by a sample of living ones, (rows,) bool; None without any."""
    rows = np.flatnonzero(alive)
    if not (count := int(tokens.counts(rows).sum())):
        return None
    lists = max(1, min(MOST_LISTS, count // LIST_TOKENS))
    made = Lists(Centroids.train(_sample(tokens, rows, SAMPLE_TOKENS * max(lists, 256)), lists), len(alive))
    complete(made, tokens, len(alive))
    return made


def complete(lists: Lists, tokens: Tokens, rows: int) -> None:
    """Add those of the first `rows` rows that are missing."""
    for part in tokens.blocks(np.arange(lists.rows, rows)):
        codes, counts = tokens.read(part)
        lists.add(tokens.coder.decode(codes), counts)


def _sample(tokens: Tokens, rows: np.ndarray, size: int) -> np.ndarray:
    """About `size` token vectors of rows chosen at random, (tokens, dim), in random order."""
    rng = np.random.default_rng(0)
    share = min(1.0, size / max(1, int(tokens.counts(rows).sum())))
    # every fourth token of four times as many rows as would do: the tokens of one passage are alike
    of_rows = min(1.0, 4 * share)
    chosen = np.sort(rng.choice(rows, max(1, round(of_rows * len(rows))), replace=False))
    kept = []
    for part in tokens.blocks(chosen):
        codes, _ = tokens.read(part)
        kept.append(tokens.coder.decode(codes[rng.random(len(codes)) < share / of_rows]))
    sample = np.concatenate(kept)
    rng.shuffle(sample)
    return sample
