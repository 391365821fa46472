"""Precisions of a generation's passages and of the queries that search it: the same, or a pair that was measured.

fp32, bf16 and fp16 go with each other: their vectors are the same within what a swap tolerates (cosine 0.9999 and
more). Those of int8 are not, and which pair of int8 with another precision loses little was measured when the
checkpoint was quantised, or is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ultrarag.encoder.engines import Quantised, family, is_int8
from ultrarag.errors import FingerprintError
from ultrarag.retrieve.generation.catalog import Generation, IndexLayout

if TYPE_CHECKING:
    from ultrarag.encoder import Encoder, Lane


def paired(layout: IndexLayout, generation: Generation, encoder: Encoder) -> tuple[Encoder, Mapping[Lane, str] | None]:
    """The encoder to serve a generation with, and the precision of queries and of passages where they differ.

    Args:
        encoder: the generation's, in the precision that queries are to have.

    Raises:
        FingerprintError: queries in that precision were not measured with passages in the generation's, or lose too
            much.
    """
    asked, stored = encoder.precision, generation.precision
    if asked == stored or not (is_int8(asked) or is_int8(stored)):
        return encoder, None
    copy = layout.checkpoint(layout.directory(generation.id))
    record = encoder.quantised or Quantised.read(copy)
    if record is None or not record.accepts(stored, asked) or (is_int8(stored) and record.precision != stored):
        raise FingerprintError(
            f"generation {generation.id} holds vectors in {stored}, and queries in {asked} were not measured with "
            f"them: open it with an encoder in {family(stored)} or with none, or let `ultrarag checkpoint quantise "
            "--eval_data` measure the pair"
        )
    serving = encoder if encoder.quantised else encoder.in_int8(copy)
    return serving, {"query": asked, "passage": stored}
