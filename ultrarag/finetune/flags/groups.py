"""The groups of settings that are ours: model, data, LoRA, evaluation, false negatives, incremental fine-tuning.

Every field is a flag of the command line and a keyword of `finetune()`; its `help` is what `--help` prints. A group is
passed on as it is to whoever needs its settings, so that each is listed here alone. Names, defaults and meaning are
those of FlagEmbedding 1.4.2 where it has the flag. Imports nothing heavy.
"""

from __future__ import annotations

import math
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrarag.errors import UsageError, did_you_mean
from ultrarag.loss_arguments import flag
from ultrarag.types import HEADS

#: How token vectors may become one dense vector.
POOLING_METHODS = ("cls", "mean", "last_token", "weighted_mean")

#: What to do with a training row that cannot be used.
BAD_ROWS = ("fail", "drop")

#: In `no_in_batch_neg`: every dataset.
EVERY_DATASET = "*"

#: How false negatives are found.
MASKS = ("none", "text", "margin", "guide")
SHARED = ("warn", "refuse")
MARGIN_TYPES = ("absolute", "relative")

#: In `sub_batch_size`, `per_device_train_batch_size` and `merge_weight`: find it out.
AUTO = "auto"
#: In `merge_with`: the model that this run starts from, and the first model of its lineage.
PARENT, BASE = "parent", "base"


@dataclass
class ModelArguments:
    """Which model is trained, and which parts of it.

    Raises:
        UsageError: when a value cannot be used.
    """

    model_name_or_path: str = flag(
        "", "The model to start from: a directory or a name on the Hub.", shown_default="required"
    )
    config_name: str | None = flag(None, "Name or path of the configuration, where it is not the model's.")
    tokenizer_name: str | None = flag(None, "Name or path of the tokenizer, where it is not the model's.")
    cache_dir: str | None = flag(None, "Where downloaded models are kept.")
    trust_remote_code: bool = flag(False, "Run Python code that comes with the model.")
    token: str | None = field(
        default_factory=lambda: os.environ.get("HF_TOKEN"),
        repr=False,  # a secret: neither in logs nor in the manifest
        metadata={"help": "The token for private models.", "shown_default": "the variable HF_TOKEN"},
    )
    use_fast_tokenizer: bool = flag(True, "Use the tokenizer written in Rust.")
    sentence_pooling_method: str | None = flag(
        None,
        "How token vectors become one dense vector.",
        choices=POOLING_METHODS,
        shown_default="what the checkpoint declares, else cls",
    )
    colbert_dim: int = flag(-1, "Dimensions of the ColBERT vectors; -1: the hidden size.")
    heads: tuple[str, ...] | None = flag(
        None,
        "The heads to train, such as dense,sparse.",
        choices=HEADS,
        split=True,
        shown_default="all that the adapter trains",
    )
    fix_encoder: bool = flag(False, "Freeze the backbone: only the heads learn.")
    fix_position_embedding: bool = flag(False, "Freeze the position embeddings.")
    freeze_layers: int = flag(
        0,
        "Freeze the first layers of the backbone, so many, and the embeddings below them: a step computes no gradient "
        "there.",
    )
    sub_batch_size: int | str | None = flag(
        None,
        "Encode this many texts at a time and keep no graph between them (GradCache): a big batch in the memory of "
        "a small one. None or -1: the whole batch at once; auto: as many as fit into memory, tried out.",
        kind="int_or_auto",
    )
    sub_batch_tokens: int | None = flag(
        None,
        "Instead of --sub_batch_size: encode texts of similar length together, at most this many tokens at a time, "
        "padding counted. Short texts are then not encoded a few at a time.",
    )
    peak_tflops: float | None = flag(
        None,
        "What the device can do, in 1e12 operations per second: the logs then say which share of it is used (MFU).",
        shown_default="known for common GPUs in bf16 and fp16",
    )

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise UsageError("--model_name_or_path is required: a directory or a name on the Hub, such as BAAI/bge-m3")
        _one_of(self, "sentence_pooling_method", POOLING_METHODS)
        if self.colbert_dim == 0 or self.colbert_dim < -1:
            raise UsageError(f"colbert_dim is {self.colbert_dim}; it must be above 0, or -1 for the hidden size")
        if self.sub_batch_size == -1:
            self.sub_batch_size = None
        if self.sub_batch_size != AUTO:
            _at_least(self, "sub_batch_size", 1)
        _at_least(self, "sub_batch_tokens", 1)
        _at_least(self, "freeze_layers", 0)
        if self.sub_batch_size is not None and self.sub_batch_tokens is not None:
            raise UsageError("sub_batch_size and sub_batch_tokens both say how a batch is cut: give one")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise UsageError(f"peak_tflops is {self.peak_tflops}; it must be above 0")
        if self.heads is not None:
            self.heads = _checked_heads(self.heads)

    @property
    def chunk_texts(self) -> int | None:
        """`sub_batch_size` as a number; `auto` was replaced by one before anybody asks."""
        return None if self.sub_batch_size is None else int(self.sub_batch_size)


@dataclass
class DataArguments:
    """Which rows are trained on, and how they become texts and batches.

    Raises:
        UsageError: when a value cannot be used, or a path of `train_data` does not exist.
    """

    train_data: Sequence[str] | Sequence[Mapping[str, Any]] = flag(
        (), "One or more JSONL files, or directories of them.", kind="data", shown_default="required"
    )
    cache_path: str | None = flag(None, "Directory in which the read data is cached.")
    train_group_size: int = flag(8, "Passages per query: one positive, the others negatives.")
    query_max_len: int = flag(32, "Longest query in tokens; the rest is cut off.")
    passage_max_len: int = flag(128, "Longest passage in tokens; the rest is cut off.")
    max_len: int | None = flag(
        None,
        "Rerankers: longest pair of query and passage in tokens, of which a query takes at most three quarters.",
        shown_default="query_max_len + passage_max_len",
    )
    sep_token: str | None = flag(
        None,
        "Rerankers that are language models: what stands between query, passage and prompt.",
        shown_default="what the model was trained with: a line break",
    )
    prompt: str | None = flag(
        None,
        "Rerankers that are language models: the question or instruction put to the model, where a row has none.",
        shown_default="the model's own",
    )
    pad_to_multiple_of: int | None = flag(None, "Pad the batch's length up to a multiple of this.")
    max_example_num_per_dataset: int = flag(100_000_000, "Use at most this many rows of each dataset.")
    query_instruction_for_retrieval: str | None = flag(None, "Instruction put before every query.")
    query_instruction_format: str = flag(
        "{}{}", "How instruction and query are joined: the first {} is the instruction, the second the query."
    )
    passage_instruction_for_retrieval: str | None = flag(None, "Instruction put before every passage.")
    passage_instruction_format: str = flag(
        "{}{}", "How instruction and passage are joined: the first {} is the instruction, the second the passage."
    )
    knowledge_distillation: bool = flag(False, "See the loss.")
    shuffle_ratio: float = flag(0.0, "Share of the passages whose sentences are shuffled.")
    same_dataset_within_batch: bool = flag(False, "Every batch comes from one dataset.")
    small_threshold: int = flag(
        0, "Datasets of one directory with fewer rows than this are merged (same_dataset_within_batch)."
    )
    drop_threshold: int = flag(0, "A merged dataset with fewer rows than this is dropped (same_dataset_within_batch).")
    no_in_batch_neg: tuple[str, ...] = flag(
        (),
        "Datasets (names of files without suffix, or of folders) whose queries do not take the other queries' "
        "passages as negatives; without a name: all datasets.",
        metavar="DATASET",
        bare=EVERY_DATASET,
    )
    on_bad_rows: str = flag(
        "fail", "On a row that cannot be used: stop, or leave it out and say how many.", choices=BAD_ROWS
    )

    def __post_init__(self) -> None:
        self.train_data = _checked_train_data(self.train_data)
        for name in ("train_group_size", "query_max_len", "passage_max_len", "max_example_num_per_dataset"):
            _at_least(self, name, 1)
        _at_least(self, "pad_to_multiple_of", 1)
        _at_least(self, "max_len", 8)
        for name in ("sep_token", "prompt"):
            if (text := getattr(self, name)) is not None:
                setattr(self, name, text.replace("\\n", "\n"))
        for name in ("small_threshold", "drop_threshold"):
            _at_least(self, name, 0)
        if not 0 <= self.shuffle_ratio <= 1:
            raise UsageError(f"shuffle_ratio is {self.shuffle_ratio}; it must lie between 0 and 1")
        _one_of(self, "on_bad_rows", BAD_ROWS)
        self.query_instruction_format = _checked_format(self, "query_instruction_format")
        self.passage_instruction_format = _checked_format(self, "passage_instruction_format")


@dataclass
class LoraArguments:
    """Low-rank adapters: small matrices that are trained in place of the backbone's own weights.

    Raises:
        UsageError: when a value cannot be used.
    """

    use_lora: bool = flag(
        False,
        "Train low-rank adapters (and the heads) and leave the backbone as it is; writes the merged model, and the "
        "adapters by themselves into adapter/. Needs the package peft.",
    )
    lora_rank: int = flag(64, "Rank of the adapters.")
    lora_alpha: float = flag(16, "The adapters' output is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = flag(0.1, "Dropout before the adapters.")
    target_modules: tuple[str, ...] = flag(
        (),
        "The linear layers that get an adapter, by the ends of their names, such as q_proj v_proj.",
        split=True,
        shown_default="all of the backbone",
    )

    def __post_init__(self) -> None:
        _at_least(self, "lora_rank", 1)
        if not self.lora_alpha > 0:
            raise UsageError(f"lora_alpha is {self.lora_alpha}; it must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")


@dataclass
class EvaluationArguments:
    """How the model is measured on held-out data before, during and after training.

    Raises:
        UsageError: when a value cannot be used, or `eval_data` does not exist.
    """

    eval_data: str | Sequence[Mapping[str, Any]] | None = flag(
        None,
        "Held-out data: a JSONL file of rows like train_data's, or a folder in BEIR's layout. Reports nDCG@10, "
        "Recall@10 and MRR@10 before, during (--eval_steps, or each epoch) and after training, and keeps the "
        "checkpoint with the best eval_ndcg@10.",
        kind="data",
        many=False,
    )
    early_stopping_patience: int | None = flag(
        None, "Stop after this many evaluations in a row without a better result."
    )
    save_min_seconds: float = flag(
        0.0,
        "Write no checkpoint within this many seconds of the last one, or of the start, unless the run is stopped: the "
        "best weights are kept in memory meanwhile. A run that is killed goes on from the last checkpoint. Several "
        "processes write all.",
    )
    ignore_identical_ids: bool = flag(
        False,
        "Leave out the passage that has the query's own id, of --eval_data and --guard_data whose queries are passages "
        "(ArguAna, Quora).",
    )

    shared_eval_data: str = flag(
        "warn",
        "What is done when rows hold queries of --eval_data, passages that answer them, or other passages of the same "
        "documents (same title, nearly the same text), for more than 1 % of its queries: its metrics then promise more "
        "than new documents will get. The report says what is shared either way.",
        choices=SHARED,
    )

    def __post_init__(self) -> None:
        _one_of(self, "shared_eval_data", SHARED)
        _at_least(self, "early_stopping_patience", 1)
        _at_least(self, "save_min_seconds", 0)
        if isinstance(self.eval_data, str) and not os.path.exists(self.eval_data):
            raise UsageError(f"eval_data '{self.eval_data}' does not exist")
        if self.early_stopping_patience is not None and self.eval_data is None:
            raise UsageError("early_stopping_patience needs --eval_data, on which to see whether the model improves")
        if self.ignore_identical_ids and self.eval_data is None:
            raise UsageError("ignore_identical_ids needs --eval_data, a folder in BEIR's layout with ids of its own")


@dataclass
class FalseNegativeArguments:
    """What is left out of the negatives of a query, and by which evidence.

    Raises:
        UsageError: when a value cannot be used.
    """

    false_negative_mask: str = flag(
        "none",
        "Leave false negatives of the batch (and of other devices) out of the loss. text: passages with the same text, "
        "but for case, width and spaces, as a positive of this query, in its row or elsewhere in the batch; margin: "
        "passages of other rows that the model itself scores above the positive less the margin; guide: passages that "
        "a guide model scores so.",
        choices=MASKS,
    )
    false_negative_margin: float = flag(
        0.0,
        "margin, guide: a passage is left out when its score is above the positive's score less this; negative: only "
        "when it is above by that much.",
    )
    false_negative_margin_type: str = flag(
        "absolute",
        "absolute: the margin is in units of the score, such as cosine; relative: it is a share of the positive's "
        "score.",
        choices=MARGIN_TYPES,
    )
    guide_model: str | None = flag(
        None, "The model whose scores find false negatives (false_negative_mask guide): a directory or a Hub name."
    )
    guide_adapter: str | None = flag(
        None, "The guide's adapter, such as bge.", shown_default="that of its manifest, else that of the trained model"
    )

    def __post_init__(self) -> None:
        _one_of(self, "false_negative_mask", MASKS)
        _one_of(self, "false_negative_margin_type", MARGIN_TYPES)
        if not math.isfinite(self.false_negative_margin):
            raise UsageError(f"false_negative_margin is {self.false_negative_margin}; it must be a finite number")
        self._check_guide()
        if self.false_negative_margin and self.false_negative_mask not in ("margin", "guide"):
            raise UsageError("false_negative_margin needs --false_negative_mask margin or guide")

    def _check_guide(self) -> None:
        guided = self.false_negative_mask == "guide"
        if guided and not self.guide_model:
            raise UsageError("--false_negative_mask guide needs --guide_model, the model whose scores decide")
        for name in ("guide_model", "guide_adapter"):
            if getattr(self, name) and not guided:
                raise UsageError(f"{name} has no effect without --false_negative_mask guide")


@dataclass
class IncrementalArguments:
    """Old data mixed in, weights averaged with an older model, and data that was seen before.

    Raises:
        UsageError: when a value cannot be used.
    """

    replay_data: Sequence[str] | Sequence[Mapping[str, Any]] = flag(
        (), "Rows of earlier runs to train on again, in batches of their own.", kind="data", shown_default="none"
    )
    replay_ratio: float | None = flag(
        None, "The share of all batches that comes from --replay_data.", shown_default="0.2 with --replay_data"
    )
    merge_with: str | None = flag(
        None,
        "Average the trained weights with an older model's: parent (the model trained from), base (the first model of "
        "its lineage), or a path. The weights as trained are kept in the folder unmerged/; of a query side "
        "(--train_side query), which is averaged with its parent alone, they are not.",
    )
    merge_weight: str = flag(
        AUTO,
        "The weight of the trained model in the average, between 0 and 1; auto: the best on --eval_data of those that "
        "lose at most --max_forgetting on --guard_data.",
        kind="str_or_number",
    )
    guard_data: str | Sequence[Mapping[str, Any]] | None = flag(
        None,
        "What the model must not forget: held-out data like --eval_data's, of another kind.",
        kind="data",
        many=False,
    )
    max_forgetting: float = flag(
        0.005,
        "What nDCG@10 on --guard_data may fall below that of the model trained from, at most (0.005: half a point).",
    )
    allow_seen_data: bool = flag(
        False, "Say nothing when rows were trained on before; a refresh of a live index otherwise refuses them."
    )

    def __post_init__(self) -> None:
        self._check_replay()
        self._check_merge()
        if isinstance(self.guard_data, str) and not os.path.exists(self.guard_data):
            raise UsageError(f"guard_data '{self.guard_data}' does not exist")
        if not 0 <= self.max_forgetting <= 1:
            raise UsageError(
                f"max_forgetting is {self.max_forgetting}; it must lie between 0 and 1 (0.005: half a point)"
            )

    @property
    def fixed_weight(self) -> float | None:
        """The weight that was given; None: it is searched for."""
        return None if self.merge_weight == AUTO else float(self.merge_weight)

    def _check_replay(self) -> None:
        for path in self.replay_data:
            if isinstance(path, str) and not os.path.exists(path):
                raise UsageError(f"replay_data '{path}' does not exist")
        if self.replay_ratio is None:
            self.replay_ratio = 0.2 if self.replay_data else None
            return
        if not self.replay_data:
            raise UsageError("replay_ratio needs --replay_data, the rows to mix in")
        if not 0 < self.replay_ratio < 1:
            raise UsageError(f"replay_ratio is {self.replay_ratio}; it must lie between 0 and 1, such as 0.2")

    def _check_merge(self) -> None:
        if self.merge_weight != AUTO:
            self._check_weight()
        if self.merge_with is None and self.merge_weight != AUTO:
            raise UsageError("merge_weight needs --merge_with: parent, base, or the path of a model")

    def _check_weight(self) -> None:
        try:
            weight = float(self.merge_weight)
        except ValueError:
            weight = -1.0
        if not 0 < weight <= 1:
            raise UsageError(
                f"merge_weight is '{self.merge_weight}'; it must be auto, or a number above 0 and at most 1 "
                "(1: the trained weights alone)"
            )


def _at_least(arguments: Any, name: str, least: int) -> None:
    value = getattr(arguments, name)
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}; it must be at least {least}")


def _one_of(arguments: Any, name: str, allowed: Sequence[str]) -> None:
    value = getattr(arguments, name)
    if value is not None and value not in allowed:
        raise UsageError(f"{name} is '{value}'; it must be one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def _checked_heads(heads: Sequence[str]) -> tuple[str, ...]:
    unknown = [head for head in heads if head not in HEADS]
    if unknown:
        raise UsageError(f"heads has '{unknown[0]}'; known are {', '.join(HEADS)}{did_you_mean(unknown[0], HEADS)}")
    if not heads:
        raise UsageError(f"heads is empty; name some of {', '.join(HEADS)}")
    return tuple(head for head in HEADS if head in heads)


def _checked_train_data(data: Sequence[Any]) -> Any:
    if not data:
        raise UsageError("--train_data is required: JSONL files or directories of them")
    if all(isinstance(row, Mapping) for row in data):
        return data
    for path in data:
        if not isinstance(path, str):
            raise UsageError(f"train_data holds a {type(path).__name__}; give paths only, or rows (dicts) only")
        if not os.path.exists(path):
            raise UsageError(f"train_data '{path}' does not exist")
    return tuple(data)


def _checked_format(arguments: Any, name: str) -> str:
    """Return the format with a typed backslash-n read as a line break, after checking that it has two `{}`."""
    text = getattr(arguments, name).replace("\\n", "\n")
    try:
        holes = [part[1] for part in string.Formatter().parse(text) if part[1] is not None]
    except ValueError:
        holes = []
    if holes != ["", ""]:
        raise UsageError(f"{name} is '{text}'; it must hold exactly two {{}}: the instruction, then the text")
    return str(text)
