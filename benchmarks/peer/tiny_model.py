"""Make the fixture's model: a tiny random XLM-RoBERTa with bge-m3's heads and a tokenizer made from its texts."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import XLMRobertaConfig, XLMRobertaModel

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
HIDDEN = 32


def make_model(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(folder)
    torch.manual_seed(20_240_917)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # With the usual 0.02 all texts get nearly the same vector, and a wrong loss would go unnoticed.
        initializer_range=0.2,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    heads = {"colbert_linear": torch.nn.Linear(HIDDEN, HIDDEN), "sparse_linear": torch.nn.Linear(HIDDEN, 1)}
    heads["sparse_linear"].bias.data.fill_(0.4)  # so that most tokens have a weight above 0, and not all
    for name, head in heads.items():
        torch.save(head.state_dict(), folder / f"{name}.pt")


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A unigram model over all characters and the commonest longer pieces (the library's trainer is not repeatable)."""
    space = pre_tokenizers.Metaspace()
    words = [word for text in texts for word, _ in space.pre_tokenize_str(text)]
    counts = Counter(word[i : i + n] for word in words for n in range(1, 6) for i in range(len(word) - n + 1))
    longer = sorted((p for p in counts if len(p) > 1 and counts[p] > 1), key=lambda p: (-len(p) * counts[p], p))
    pieces = [*sorted(p for p in counts if len(p) == 1), *longer[:200]]
    vocabulary = [(token, 0.0) for token in SPECIAL]
    vocabulary += [(piece, round(math.log(counts[piece] / len(words)), 4)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram([*vocabulary, ("<mask>", 0.0)], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = space, decoders.Metaspace()
    tokenizer.add_special_tokens([*SPECIAL, "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def write_tokenizer_config(folder: Path) -> None:
    roles = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    tokens = {f"{role}_token": token for role, token in roles.items()}
    settings = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 128, "padding_side": "right"}
    for name, content in (("special_tokens_map", tokens), ("tokenizer_config", settings | tokens)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
