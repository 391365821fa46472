"""What a causal reranker's folder says: where its score comes from, and how a pair is written; free of torch.

It is said by the files of sentence-transformers' CrossEncoder and by the tokenizer's chat template, or, of models that
were published before both, by the family alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ultrarag.adapters.pair_format import SLOTS, Frame, PairTemplate
from ultrarag.adapters.sentence_transformers_files import read_json, write_json
from ultrarag.claims import PAIR_WORDS, ZERANK_CODE
from ultrarag.errors import CheckpointError

_MODULES, _TRANSFORMER, _MODEL = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
#: Roles of the messages that carry instruction, query and passage.
_ROLES = dict(zip(SLOTS, ("system", "query", "document"), strict=True))
#: zerank's before it had these roles, and the code that it came with then, which strips both texts.
_ZERANK_ROLES = {"query": "system", "passage": "user"}
#: Arguments of a declared chat template that concern lengths and not the text.
_SIZES = ("restore_suffix", "truncation", "max_length", "padding", "return_tensors", "pad_to_multiple_of")
_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Reading:
    """How a model reads a pair and answers."""

    template: PairTemplate
    #: the word whose logit is the score, and perhaps one whose logit is subtracted
    answers: tuple[str, ...]


def _qwen3() -> tuple[Frame, Frame, tuple[str, ...]]:
    """Qwen3-Reranker, from its model card."""
    before = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: '
    )
    between = ("\n<Query>: ", "\n<Document>: ", f"{_ANSWER}<think>\n\n</think>\n\n")
    usual = "Given a web search query, retrieve relevant passages that answer the query"
    plain = Frame((f"{before}{usual}{between[0]}", *between[1:]), SLOTS[1:])
    return plain, Frame((before, *between), SLOTS), ("yes", "no")


def _qwen2() -> tuple[Frame, Frame, tuple[str, ...]]:
    """mxbai-rerank-v2, from its package."""
    before = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    task = (
        "\nYou are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    end = ("\ndocument: ", f"{task}{_ANSWER}")
    asked = Frame((f"{before}instruction: ", "\nquery: ", *end), SLOTS)
    return Frame((f"{before}query: ", *end), SLOTS[1:]), asked, ("1", "0")


#: By `model_type`, what the reranker of that family reads where its files do not say it.
_FAMILIES = dict(zip(PAIR_WORDS, (_qwen2, _qwen3), strict=True))


@dataclass
class CrossEncoderFiles:
    """What sentence-transformers' CrossEncoder declares, kept to be written again."""

    modules: list[dict[str, Any]] = field(default_factory=list)
    #: folder of the transformer, relative to the model's
    transformer: str = ""
    #: sentence_bert_config.json
    options: dict[str, Any] = field(default_factory=dict)
    #: config_sentence_transformers.json
    model: dict[str, Any] = field(default_factory=dict)
    #: LogitScore's folder, and its config.json; None of a classifier
    score_folder: str = ""
    score: dict[str, Any] | None = None
    #: types of modules that no CrossEncoder has which is run here
    others: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """The instruction that is put to the model unless a caller gives one; "" for that of the chat template."""
        name = self.model.get("default_prompt_name")
        return str((self.model.get("prompts") or {}).get(name) or "") if name else ""

    @property
    def answers(self) -> tuple[int, ...]:
        """The tokens whose logits are the score."""
        score = self.score or {}
        return tuple(int(score[name]) for name in ("true_token_id", "false_token_id") if score.get(name) is not None)

    @property
    def messages(self) -> Mapping[str, Any] | None:
        """How pairs become the chat template's messages; None where they are not said to."""
        found: Mapping[str, Any] | None = (self.options.get("modality_config") or {}).get("message")
        return found

    def write(self, folder: Path, prompt: str, max_length: int | None) -> None:
        """Write the files, with this instruction and length where the model's are no longer those declared."""
        model, options = dict(self.model), dict(self.options)
        if prompt != self.prompt:
            model["prompts"] = {**(model.get("prompts") or {}), "instruction": prompt}
            model["default_prompt_name"] = "instruction"
        if max_length != options.get("max_seq_length"):
            options["max_seq_length"] = max_length
        modules = [{**m, "path": ""} if m.get("path") == self.transformer else m for m in self.modules]
        for name, value in ((_MODULES, modules), (_TRANSFORMER, options), (_MODEL, model)):
            write_json(folder / name, value)
        if self.score is not None:
            (folder / self.score_folder).mkdir(exist_ok=True)
            write_json(folder / self.score_folder / "config.json", self.score)


def read_files(folder: Path) -> CrossEncoderFiles | None:
    """Read the files of a CrossEncoder, and what other modules they have; None where there are none."""
    if not (folder / _MODULES).is_file():
        return None
    found = CrossEncoderFiles(modules=read_json(folder / _MODULES))
    for module in found.modules:
        name, path = str(module["type"]).rsplit(".", 1)[-1], str(module.get("path", ""))
        if name == "Transformer":
            found.transformer = path
        elif name == "LogitScore":
            found.score_folder, found.score = path, read_json(folder / path / "config.json")
        else:
            found.others.append(str(module["type"]))
    if (folder / found.transformer / _TRANSFORMER).is_file():
        found.options = read_json(folder / found.transformer / _TRANSFORMER)
    if (folder / _MODEL).is_file():
        found.model = read_json(folder / _MODEL)
    return found


def made_files(true_token: int, false_token: int | None = None) -> CrossEncoderFiles:
    """The files of a causal language model that was published without them, so that CrossEncoder reads it too."""
    kinds = (
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_LogitScore", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"),
    )
    forward = {"method": "forward", "method_output_name": "logits"}
    return CrossEncoderFiles(
        modules=[{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)],
        options={
            "transformer_task": "text-generation",
            "modality_config": {"text": forward, "message": {**forward, "format": "flat"}},
            "module_output_name": "causal_logits",
        },
        model={"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"},
        score_folder=kinds[1][0],
        score={"true_token_id": true_token, "false_token_id": false_token},
    )


def read_pair_reading(folder: Path, tokenizer: Any, model_type: str, files: CrossEncoderFiles | None) -> Reading:
    """Return how pairs are written: by the chat template where it carries pairs, else as the family does.

    Raises:
        CheckpointError: nothing says how, or the template does more with the texts than to write them.
    """
    declared = files.messages if files else None
    options = ((files.options.get("processing_kwargs") or {}).get("chat_template") or {}) if files else {}
    options = {name: value for name, value in options.items() if name not in _SIZES}
    source = f"the chat template of {folder}"
    for structured in (False, True) if not declared else (declared.get("format") == "structured",):
        if found := _frames(tokenizer, _ROLES, options, structured, source):
            return Reading(PairTemplate(*found, source), ("yes", "no"))
    if (folder / ZERANK_CODE).is_file():
        if found := _frames(tokenizer, _ZERANK_ROLES, {"add_generation_prompt": True}, False, source):
            plain = replace(found[0], stripped=frozenset(SLOTS))
            return Reading(PairTemplate(plain, None, source), ("Yes",))
    elif not declared and model_type in _FAMILIES:
        plain, asked, answers = _FAMILIES[model_type]()
        return Reading(PairTemplate(plain, asked, f"the format of {model_type} rerankers"), answers)
    raise CheckpointError(
        f"{folder}: nothing says how a pair is written for this '{model_type}' model: its chat template does not carry "
        f"messages of the roles 'query' and 'document', and only {', '.join(sorted(_FAMILIES))} have a format of "
        "their own; give it a chat_template.jinja that writes both roles, or use 'bge-reranker-gemma' for a plain "
        "language model and 'bge-reranker' for a classifier"
    )


def _frames(
    tokenizer: Any, roles: Mapping[str, str], options: Mapping[str, Any], structured: bool, source: str
) -> tuple[Frame, Frame | None] | None:
    """What the chat template writes around a pair, without and with an instruction; None: it carries no pairs."""
    if not tokenizer.chat_template:
        return None

    def render(texts: Mapping[str, str]) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": texts[slot]}] if structured else texts[slot]}
            for slot, role in roles.items()
            if slot in texts
        ]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    plain = _frame(render, SLOTS[1:], source)
    return None if plain is None else (plain, _frame(render, SLOTS, source) if SLOTS[0] in roles else None)


def _frame(render: Callable[[Mapping[str, str]], str], slots: Sequence[str], source: str) -> Frame | None:
    """Find where a template writes the texts, by giving it texts that are easily found again."""
    from jinja2 import TemplateError

    marks = {slot: f"xq{slot}qx" for slot in slots}
    try:
        text = render({slot: f" {mark} " for slot, mark in marks.items()})
    except (TemplateError, TypeError):
        return None
    if any(text.count(mark) != 1 for mark in marks.values()):
        return None
    stripped = frozenset(slot for slot, mark in marks.items() if f" {mark} " not in text)
    literals, order, rest = [], sorted(slots, key=lambda slot: text.index(marks[slot])), text
    for slot in order:
        before, _, rest = rest.partition(marks[slot] if slot in stripped else f" {marks[slot]} ")
        literals.append(before)
    frame = Frame((*literals, rest), tuple(order), stripped)
    odd = {slot: f'\n {slot}\'s "a"  <b> {{{{c}}}} &amp;\t' for slot in slots}
    if frame.text(odd.get("instruction", ""), odd["query"], odd["passage"]) != render(odd):
        raise CheckpointError(
            f"{source} changes the texts that it writes, so that they cannot be cut to a length: not supported"
        )
    return frame


def chat_template(template: PairTemplate) -> str:
    """A chat template that writes pairs as `template` does, for sentence-transformers."""
    lines = [
        f'{{%- set {slot} = messages | selectattr("role", "eq", "{role}") | map(attribute="content") | first '
        f'| default("") -%}}\n'
        for slot, role in _ROLES.items()
    ]
    plain = _jinja(template.plain)
    if template.asked is None:
        return "".join([*lines, plain])
    return "".join([*lines, "{%- if instruction -%}", _jinja(template.asked), "{%- else -%}", plain, "{%- endif -%}"])


def _jinja(frame: Frame) -> str:
    slots = [f"{{{{ {slot}{' | trim' if slot in frame.stripped else ''} }}}}" for slot in frame.slots]
    literals = [f"{{{{ {json.dumps(text)} }}}}" if text else "" for text in frame.literals]
    return "".join(part for pair in zip(literals, [*slots, ""], strict=True) for part in pair)
