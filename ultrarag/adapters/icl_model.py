"""Loading an instructed decoder as an `Embedder`: its pooling, its end token, its query format."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.adapters.embedder import Embedder
from ultrarag.adapters.embedder_files import load_embedder
from ultrarag.adapters.sentence_transformers_files import read_declaration
from ultrarag.errors import CheckpointError
from ultrarag.tokenizer_limits import keep_limits
from ultrarag.types import EncoderSettings

if TYPE_CHECKING:
    from ultrarag.hookspecs import LoadOptions

#: e5-mistral-7b-instruct and most that came after it.
INSTRUCT_FORMAT = "Instruct: {}\nQuery: {}"
#: bge-en-icl, which has tokens of its own for the parts.
ICL_FORMAT = "<instruct>{}\n<query>{}\n<response>"
_ICL_TOKENS = ("<instruct>", "<query>", "<response>")
_PROBE = "a b c d e f"
_DECLARED = re.compile(r"Instruct: (?P<instruction>.*)\nQuery:(?P<space> ?)", re.DOTALL)


def load_icl(path: str, options: LoadOptions, heads: tuple[str, ...]) -> Embedder:
    """Load an instructed decoder; last-token pooling and unit length unless it declares otherwise.

    Raises:
        CheckpointError: weights are missing, or the tokenizer cannot be made to append its end token.
    """
    declared = read_declaration(Path(path))
    if options.pooling is None and (declared is None or declared.pooling is None):
        options = replace(options, pooling="last_token")
    model = load_embedder(path, options, heads)
    if model.settings.pooling == "last_token":
        with keep_limits(model.tokenizer):
            close_with_end_token(model.tokenizer, path)
    _format_queries(model.settings, model.tokenizer)
    return model


def close_with_end_token(tokenizer: Any, path: str) -> None:
    """Make `tokenizer` append its end token to every text, after truncation, and keep that when it is saved.

    Raises:
        CheckpointError: it has no end token, or cannot append one.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise CheckpointError(f"{path}: the tokenizer has no end token (eos_token), whose hidden state is the vector")
    before = tokenizer(_PROBE)["input_ids"]
    if not _closes_texts(tokenizer, before):
        _append_end_token(tokenizer)
        before = [*before, end]
    cut = tokenizer(_PROBE, truncation=True, max_length=4)["input_ids"]
    if tokenizer(_PROBE)["input_ids"] != before or cut[-1:] != before[-1:]:
        raise CheckpointError(f"{path}: the tokenizer cannot be made to append its end token '{tokenizer.eos_token}'")


def _closes_texts(tokenizer: Any, ids: list[int]) -> bool:
    """Whether a text ends with its end token, or with another that the tokenizer puts after every text.

    Qwen3-Embedding closes texts with `<|endoftext|>`, and its end token is `<|im_end|>`.
    """
    content = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return bool(
        ids[-1:] == [tokenizer.eos_token_id] or (ids[-1:] != content[-1:] and ids[-1] in tokenizer.all_special_ids)
    )


def _append_end_token(tokenizer: Any) -> None:
    """By its flags where it was saved with them, for they are read again at the next loading; else in its template."""
    if "add_eos_token" in tokenizer.init_kwargs or "add_bos_token" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["add_eos_token"] = True
        tokenizer.add_eos_token = True
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    content["post_processor"] = _ended(content["post_processor"], tokenizer.eos_token, tokenizer.eos_token_id)
    backend.post_processor = Tokenizer.from_str(json.dumps(content)).post_processor


def _ended(processor: dict[str, Any] | None, token: str, number: int) -> dict[str, Any]:
    """A post-processor of tokenizers, as JSON, that also appends `token`.

    The template that is there is extended: of two templates in sequence only the first is applied.
    """
    if processor is None:
        text = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": text[:1], "pair": text, "special_tokens": {}}
        return _ended(template, token, number)
    if processor["type"] == "Sequence" and processor["processors"]:
        *first, last = processor["processors"]
        return {**processor, "processors": [*first, _ended(last, token, number)]}
    if processor["type"] != "TemplateProcessing":
        return {"type": "Sequence", "processors": [processor, _ended(None, token, number)]}
    end = {"id": token, "ids": [number], "tokens": [token]}
    return {
        **processor,
        "single": [*processor["single"], {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [*processor["pair"], {"SpecialToken": {"id": token, "type_id": 1}}],
        "special_tokens": {**processor["special_tokens"], token: end},
    }


def _format_queries(settings: EncoderSettings, tokenizer: Any) -> None:
    """Set the format that the model was trained with, and the bare instruction of a prompt in that format."""
    vocabulary = tokenizer.get_vocab()
    if all(token in vocabulary for token in _ICL_TOKENS):
        settings.query_format = ICL_FORMAT
        return
    declared = _DECLARED.fullmatch(settings.query_instruction)
    if declared:
        settings.query_instruction = declared["instruction"]
        settings.query_format = "Instruct: {}\nQuery:" + declared["space"] + "{}"
    elif not settings.query_instruction:
        settings.query_format = INSTRUCT_FORMAT
