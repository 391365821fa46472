"""CausalReranker: a language model that answers whether a passage meets a query, and its files.

It is published as a language model whose answer is one token, or as the classifier that those tokens' rows make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.modeling_layers import GenericForSequenceClassification

from ultrarag.adapters.causal_reranker_files import (
    CrossEncoderFiles,
    chat_template,
    made_files,
    read_files,
    read_pair_reading,
)
from ultrarag.adapters.embedder_files import load_tokenizer
from ultrarag.adapters.llm_reranker_model import (
    PairReader,
    answer_logits,
    at_last_token,
    load_backbone,
    refuse_pooling,
    save_language_model,
)
from ultrarag.adapters.pair_format import PairTemplate, fast_backend, token_ids
from ultrarag.adapters.reranker_model import check_one_label, head_prefixes
from ultrarag.errors import CheckpointError
from ultrarag.packing import hidden_states
from ultrarag.types import Embeddings, EncoderSettings, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultrarag.hookspecs import Features, LoadOptions


class CausalReranker(PairReader):
    """A language model, or its classifier, over pairs written by a template; state-dict keys: `backbone.*`."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        path: str,
        template: PairTemplate,
        answers: Sequence[int],
        files: CrossEncoderFiles | None,
    ) -> None:
        super().__init__(backbone, tokenizer, path)
        self.template = template
        #: the token whose logit is the score, and perhaps one whose logit is subtracted; none: a classifier's logit
        self.answers = tuple(answers)
        self.files = files
        #: parts of the backbone that --fix_encoder and LoRA leave to be trained whole
        self.head_prefixes = () if self.answers else head_prefixes(backbone)
        self.settings = EncoderSettings(
            heads=("scores",),
            prompt=files.prompt if files else "",
            passage_max_length=files.options.get("max_seq_length") if files else None,
        )

    def pair_tokens(
        self,
        queries: Sequence[str],
        passages: Sequence[str],
        query_max_length: int | None,
        max_length: int | None,
        passage_max_length: int | None = None,
        prompts: Sequence[str | None] | None = None,
    ) -> Tokens:
        """Write each pair into the template and tokenize it; of a pair that is too long the passage is cut.

        Args:
            prompts: a pair's own instruction, None: the model's, "": that of the template, if it has one.
        """
        usual = self.settings.prompt or ""
        asked = [usual if prompt is None else prompt for prompt in prompts or [None] * len(queries)]
        pairs = list(zip(asked, queries, passages, strict=True))
        return self.template.tokens(self.reader, pairs, query_max_length, max_length, passage_max_length)

    def encode(self, features: Features) -> Embeddings:
        """Return the score of each pair, (batch,)."""
        if not self.answers:
            return Embeddings(scores=self._classify(features))
        logits = answer_logits(self.backbone, features, self.answers)
        return Embeddings(scores=logits[:, 0] if len(self.answers) == 1 else logits[:, 0] - logits[:, 1])

    def _classify(self, features: Features) -> Tensor:
        """The classifier's logit, without padding where it is a linear function of the last token, as Qwen's is."""
        backbone: Any = self.backbone
        mask = features["attention_mask"]
        if issubclass(type(backbone), GenericForSequenceClassification):
            return backbone.score(at_last_token(hidden_states(backbone.base_model, features), mask))[:, 0]
        logits: Tensor = backbone(input_ids=features["input_ids"], attention_mask=mask, return_dict=True).logits
        return logits[:, 0]


def load_causal_reranker(path: str, options: LoadOptions) -> CausalReranker:
    """Load a causal reranker in any of its layouts; a plain language model of the same families may become one.

    Raises:
        CheckpointError: weights are missing, it is another kind of model, or nothing says how it reads a pair.
        UsageError: an option that a reranker does not have.
    """
    refuse_pooling(options)
    folder = Path(path)
    files = read_files(folder)
    if files and files.others:
        raise CheckpointError(
            f"{folder}: the module '{files.others[0]}' makes it no causal reranker, which has a Transformer and a "
            "LogitScore: use the adapter 'bge' or 'sentence-transformers' for an embedding model"
        )
    body = folder / files.transformer if files else folder
    backbone, classifier = _load(body, options, files)
    tokenizer = load_tokenizer(body, options)
    reading = read_pair_reading(body, tokenizer, backbone.config.model_type, files)
    if classifier:
        return CausalReranker(backbone, tokenizer, path, reading.template, (), files)
    tokenizer.padding_side = "left"  # as other tools pad, which take the logits of the last column
    backend = fast_backend(tokenizer, path)
    answers = files.answers if files else tuple(_token(backend, word, path) for word in reading.answers)
    _check_vocabulary(answers, backbone, path)
    if files is None:  # what is known of it by its family alone is said in the files that it is saved with
        files = made_files(*answers)
        tokenizer.chat_template = chat_template(reading.template)
    return CausalReranker(backbone, tokenizer, path, reading.template, answers, files)


def _load(body: Path, options: LoadOptions, files: CrossEncoderFiles | None) -> tuple[PreTrainedModel, bool]:
    """The model, and whether it is a classifier."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        options.config_name or body,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
        token=options.token,
    )
    classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if classifier:
        check_one_label(config, body)
    elif files and files.score is None:
        raise CheckpointError(
            f"{body}: its modules.json has no LogitScore, and its config.json names no sequence classifier: nothing "
            "says where the score comes from"
        )
    return load_backbone(body, options, classifier), classifier


def _token(backend: Any, word: str, path: str) -> int:
    """The one token that a word is."""
    ids: list[int] = token_ids(backend, [word])[0]
    if len(ids) != 1:
        raise CheckpointError(
            f"{path}: the tokenizer splits '{word}' into {len(ids)} tokens, and the score is the logit of one: name it "
            "in a LogitScore (true_token_id, false_token_id), as sentence-transformers' CrossEncoder does"
        )
    return ids[0]


def _check_vocabulary(answers: Sequence[int], backbone: PreTrainedModel, path: str) -> None:
    size = backbone.config.get_text_config().vocab_size
    if not answers or not all(0 <= token < size for token in answers):
        raise CheckpointError(f"{path}: LogitScore names the tokens {list(answers)} of a vocabulary of {size}")


def save_causal_reranker(model: CausalReranker, path: str, state_dict: Mapping[str, Any]) -> None:
    """Write the model as it was published; a language model that had no files of CrossEncoder gets them.

    A classifier without them stays so: whoever calls it writes the pair.
    """
    save_language_model(model, path, state_dict)
    if model.files:
        model.files.write(Path(path), model.settings.prompt or "", model.settings.passage_max_length)
