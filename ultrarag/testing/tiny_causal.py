"""Tiny causal rerankers in the layouts that Qwen3-Reranker, mxbai-rerank-v2 and zerank were published in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.testing.tiny import MAX_LENGTH, TEXTS, random_model, tiny_config, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: How Qwen's tokenizers split a text before they look for tokens, which may begin with a space or end a line.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GET = '{{%- set {0} = messages | selectattr("role", "eq", "{1}") | map(attribute="content") | first{2} -%}}\n'
_PAIR = _GET.format("query", "query", "") + _GET.format("document", "document", "")
_TASK = "Given a web search query, retrieve relevant passages that answer the query"
#: A general chat template: a pair's roles write nothing.
_CHAT = (
    "{%- for message in messages -%}{%- if message.role in ('system', 'user', 'assistant') -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_QWEN3 = (
    _GET.format("task", "system", f' | default("{_TASK}")')
    + _PAIR
    + "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {{ task }}\n'
    "<Query>: {{ query }}\n<Document>: {{ document }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n\n"
)
_MXBAI = (
    _GET.format("task", "system", ' | default("")')
    + _PAIR
    + "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{% if task %}instruction: {{ task }}\n{% endif %}query: {{ query }}\ndocument: {{ document }}\n"
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 "
    "for not relevant, 1 for relevant).\nRelevance:<|im_end|>\n<|im_start|>assistant\n\n"
)
_ZERANK = (
    _PAIR + "<|im_start|>system\n{{ query | trim }}<|im_end|>\n<|im_start|>user\n{{ document | trim }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Layout -> (model_type, chat template, the words whose logits count)
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "qwen3": ("qwen3", _QWEN3, ("yes", "no")),
    "qwen3-original": ("qwen3", _CHAT, ("yes", "no")),
    "qwen3-classifier": ("qwen3", _QWEN3, ("yes", "no")),
    "qwen3-classifier-original": ("qwen3", "", ("yes", "no")),
    "mxbai": ("qwen2", _MXBAI, ("1", "0")),
    "mxbai-original": ("qwen2", _CHAT, ("1", "0")),
    "zerank": ("qwen3", _ZERANK, ("Yes",)),
    "zerank-original": ("qwen3", _CHAT, ("Yes",)),
}


def tiny_causal_reranker(folder: Path, layout: str = "qwen3", seed: int = 0) -> None:
    """A Qwen that answers whether a passage meets a query, as one of LAYOUTS.

    "original" are the files from before sentence-transformers read such models: nothing in them says how a pair is
    written. A "classifier" has the difference of the answers' rows as its head.

    Raises:
        UsageError: an unknown layout.
    """
    import transformers

    if layout not in LAYOUTS:
        raise UsageError(f"no layout '{layout}'{did_you_mean(layout, LAYOUTS)}; known: {', '.join(LAYOUTS)}")
    kind, template, answers = LAYOUTS[layout]
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = template or None
    classes = {"qwen3": ("Qwen3Config", "Qwen3"), "qwen2": ("Qwen2Config", "Qwen2")}[kind]
    more = {"head_dim": 8} if kind == "qwen3" else {}
    config = tiny_config(getattr(transformers, classes[0]), tokenizer, num_key_value_heads=2, **more)
    config.max_position_embeddings, config.tie_word_embeddings = 3 * MAX_LENGTH, kind == "qwen3"
    model = random_model(getattr(transformers, f"{classes[1]}ForCausalLM"), config, seed)
    tokens = [int(tokenizer.get_vocab()[word]) for word in answers]
    if "classifier" in layout:
        model = _classifier(model, tokens)
    write_model(folder, model, tokenizer)
    if layout.endswith("original"):
        card = f"---\nlibrary_name: transformers\npipeline_tag: text-ranking\n---\n\n# A tiny {layout} reranker\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
    if layout == "zerank-original":
        (folder / "modeling_zeranker.py").write_text("# the published model's own scoring code\n", encoding="utf-8")
    elif layout in ("qwen3", "mxbai", "zerank"):
        _write_files(folder, tokens, layout == "zerank")


def _classifier(model: Any, tokens: list[int]) -> Any:
    from transformers import Qwen3ForSequenceClassification

    values = {name: value for name, value in model.config.to_dict().items() if name not in ("id2label", "label2id")}
    config = type(model.config)(**{**values, "num_labels": 1})
    classifier: Any = random_model(Qwen3ForSequenceClassification, config, 0)
    classifier.model.load_state_dict(model.model.state_dict())
    rows = model.lm_head.weight.data
    classifier.score.weight.data.copy_((rows[tokens[0]] - rows[tokens[1]])[None])
    return classifier


def _write_files(folder: Path, tokens: list[int], generation_prompt: bool) -> None:
    """The files of sentence-transformers' CrossEncoder."""
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{kind}"}
        for number, (path, kind) in enumerate(zip(("", "1_LogitScore"), kinds, strict=True))
    ]
    forward = {"method": "forward", "method_output_name": "logits"}
    options = {
        "transformer_task": "text-generation",
        "modality_config": {"text": forward, "message": {**forward, "format": "flat"}},
        "module_output_name": "causal_logits",
    }
    if generation_prompt:
        options["processing_kwargs"] = {"chat_template": {"add_generation_prompt": True}}
    values = {
        "modules.json": modules,
        "sentence_bert_config.json": options,
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "prompts": {},
            "default_prompt_name": None,
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
        "1_LogitScore/config.json": {"true_token_id": tokens[0], "false_token_id": (*tokens, None)[1]},
    }
    (folder / "1_LogitScore").mkdir()
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")


def tiny_qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits as Qwen's do, with tokens for most words of the templates and of `TEXTS`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    splitter = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    for text in (" yes no Yes 1 0.\n?\n", "yes", "no", "Yes", _QWEN3, _MXBAI, *TEXTS):
        for word, _ in splitter.pre_tokenize_str(text):
            for end in range(2, len(word) + 1):  # each word out of its beginning and one more letter
                merges[word[: end - 1], word[end - 1]] = None
                vocabulary.setdefault(word[:end], len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizers.NFC(), splitter, decoders.ByteLevel()
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=3 * MAX_LENGTH, pad_token=special[0], eos_token=special[2]
    )
