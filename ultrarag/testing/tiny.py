"""Tiny random models with a tokenizer of their own, made in a fraction of a second and without a network.

Each function fills a folder as `save_pretrained` would, for a test that wants a model but not a download.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


#: What the tokenizers are trained on, and what the conformance kit's toy batch is made of.
TEXTS = (
    "What is a vector database?",
    "A vector database stores embeddings and finds the nearest ones.",
    "How do seals sleep under water?",
    "Seals sleep for minutes at a time while they sink slowly.",
    "Why does bread need a hot oven?",
    "A hot oven turns the water in the dough into steam, so the bread rises.",
    "怎样防止自行车链条生锈？",
    "骑车淋雨以后先擦干链条，再滴一点润滑油。",
)
#: Tokens that the tiny models accept, special ones included.
MAX_LENGTH = 128
_SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {
        "bos": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "unk": "<unk>",
        "cls": "<s>",
        "sep": "</s>",
        "mask": "<mask>",
    },
    "decoder": {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"},
}


def tiny_bert(folder: Path, pooling: str = "mean", seed: int = 0) -> None:
    """A BERT with `modules.json`: pooling (cls or mean) and normalisation, as a sentence-transformers model has."""
    from transformers import BertConfig, BertModel

    from ultrarag.adapters import write_declaration
    from ultrarag.types import EncoderSettings

    tokenizer = tiny_tokenizer("bert")
    write_model(folder, random_model(BertModel, tiny_config(BertConfig, tokenizer), seed), tokenizer)
    settings = EncoderSettings(
        pooling=pooling, normalize=True, query_max_length=MAX_LENGTH, passage_max_length=MAX_LENGTH
    )
    write_declaration(folder, settings, 32)


def tiny_masked_lm(folder: Path, seed: int = 0) -> None:
    """A BERT with its masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = tiny_tokenizer("bert")
    write_model(folder, random_model(BertForMaskedLM, tiny_config(BertConfig, tokenizer), seed), tokenizer)


def tiny_embedding_gemma2(folder: Path, seed: int = 0) -> None:
    """An EmbeddingGemma 2 as published: a root configuration, a tower for images, files of its processors."""
    from transformers import EmbeddingGemma2Config, EmbeddingGemma2Model

    tokenizer = tiny_tokenizer("decoder")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "embedding_dim": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "sliding_window_pattern": 2,
        "sliding_window": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.2,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "position_embedding_size": 16,
    }
    config = EmbeddingGemma2Config(
        text_config={**text, **heads, **special}, vision_config={**vision, **heads}, audio_config=None
    )
    write_model(folder, random_model(EmbeddingGemma2Model, config, seed), tokenizer)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps({"processor_class": "EmbeddingGemma2Processor"}), encoding="utf-8")
    pooling = {"word_embedding_dimension": 48, "pooling_mode": "mean"}
    _write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"})
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


#: A model that no library knows, as hub models with code of their own have it.
_OWN_CODE = """
from transformers import BertConfig, BertModel


class AcmeConfig(BertConfig):
    model_type = "acme"


class AcmeModel(BertModel):
    config_class = AcmeConfig
"""


def tiny_remote_code(folder: Path, seed: int = 0) -> None:
    """A BERT of an unknown model type, whose class is in a Python file of the folder: `trust_remote_code` runs it."""
    tiny_bert(folder, seed=seed)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "acme", "architectures": ["AcmeModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_acme.AcmeConfig", "AutoModel": "modeling_acme.AcmeModel"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling_acme.py").write_text(_OWN_CODE.lstrip(), encoding="utf-8")


def tiny_splade(folder: Path, seed: int = 0, bare: bool = False) -> None:
    """A SPLADE as sentence-transformers has it: a masked language model under SpladePooling.

    Args:
        bare: as naver published them: the masked language model, and a model card that says what it is.
    """
    tiny_masked_lm(folder, seed)
    if bare:
        card = "---\nlanguage: en\ntags:\n- splade\n- bag-of-words\n---\n\n# A tiny SPLADE\n"
        (folder / "README.md").write_text(card, encoding="utf-8")
        return
    modules = ("base.modules.transformer.Transformer", "sparse_encoder.modules.splade_pooling.SpladePooling")
    kinds = [f"sentence_transformers.{kind}" for kind in modules]
    places = dict(zip(("", "1_SpladePooling"), kinds, strict=True))
    _write_modules(folder, places)
    values = {"sentence_bert_config.json": {"transformer_task": "fill-mask"}, "1_SpladePooling/config.json": {}}
    values["config_sentence_transformers.json"] = {"model_type": "SparseEncoder"}
    for name, value in values.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def tiny_router(folder: Path, kind: str = "inference-free", seed: int = 0) -> None:
    """Ways of their own for queries and documents, as sentence-transformers writes them.

    Args:
        kind: "inference-free" (queries by a weight for each token, documents by a SPLADE), "dense" (two BERTs),
            "heads" (one BERT, and a projection for each side), or "static" (queries by a vector for each token of
            another tokenizer, documents by a BERT).
    """
    import torch
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

    def reader(name: str, number: int, masked: bool = False) -> Transformer:
        (tiny_masked_lm if masked else tiny_bert)(folder / name, seed=seed + number)
        more = {"transformer_task": "fill-mask"} if masked else {}
        return Transformer(str(folder / name), max_seq_length=MAX_LENGTH, **more)

    modules: list[Any]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "inference-free":
            body = reader("body", 0, masked=True)
            tokenizer: Any = body.tokenizer
            table = SparseStaticEmbedding(tokenizer, torch.rand(len(tokenizer)) + 0.1)
            modules = [Router.for_query_document([table], [body, SpladePooling()])]
        elif kind == "dense":
            routes: list[Any] = [
                [reader(name, number), Pooling(32, "mean")] for number, name in enumerate(("body", "other"))
            ]
            modules = [Router.for_query_document(*routes), Normalize()]
        elif kind == "static":
            other = tiny_tokenizer("roberta", TEXTS[::2])
            vectors: Any = StaticEmbedding(other, torch.randn(len(other), 32))
            modules = [Router.for_query_document([vectors], [reader("body", 0), Pooling(32, "mean")]), Normalize()]
        else:
            heads: list[Any] = [[Dense(32, 16, bias=False)], [Dense(32, 16, bias=False)]]
            modules = [reader("body", 0), Pooling(32, "mean"), Router.for_query_document(*heads), Normalize()]
    library = SparseEncoder if kind == "inference-free" else SentenceTransformer
    written = library(modules=modules, device="cpu")
    for name in ("body", "other"):
        shutil.rmtree(folder / name, ignore_errors=True)
    written.save_pretrained(str(folder), create_model_card=False)


def tiny_static(folder: Path, model2vec: bool = False, seed: int = 0) -> None:
    """Static embeddings, 32 numbers a token, as sentence-transformers or model2vec (potion) has them.

    A potion keeps few rows, and for each token the number of its row and a weight.
    """
    import torch
    from safetensors.torch import save_file

    tokenizer = tiny_tokenizer("bert")
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(len(tokenizer), 32, generator=draw)
    weights = {"embedding.weight": rows}
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"": "StaticEmbedding"}
    if model2vec:
        numbers = torch.arange(len(tokenizer)) % 100
        weights = {
            "embeddings": rows[:100].clone(),
            "mapping": numbers,
            "weights": torch.rand(len(rows), generator=draw),
        }
        kinds["1_Normalize"] = "Normalize"
        config = {"model_type": "model2vec", "architectures": ["StaticModel"], "hidden_dim": 32, "normalize": True}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    _write_modules(folder, kinds)


def _write_modules(folder: Path, kinds: dict[str, str]) -> None:
    """Write modules.json of sentence-transformers: folder -> class, one of its own by the last part alone."""
    kinds = {path: kind if "." in kind else f"sentence_transformers.models.{kind}" for path, kind in kinds.items()}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    for path in filter(None, kinds):
        (folder / path).mkdir(exist_ok=True)


def tiny_m3(folder: Path, seed: int = 0, modules: bool = False) -> None:
    """An XLM-RoBERTa with bge-m3's sparse and ColBERT heads.

    Args:
        modules: with the files of sentence-transformers, which reads the dense head alone, as bge-m3 is published.
    """
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    tokenizer = tiny_tokenizer("roberta")
    write_model(folder, random_model(XLMRobertaModel, tiny_config(XLMRobertaConfig, tokenizer), seed), tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for name, width in {"sparse": 1, "colbert": 32}.items():
            head = torch.nn.Linear(32, width)
            torch.nn.init.constant_(head.bias, 1.0)  # a random sparse head may be zero for every token
            torch.save(head.state_dict(), folder / f"{name}_linear.pt")
    if modules:
        _write_modules(folder, {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"})
        pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def tiny_cross_encoder(folder: Path, seed: int = 0) -> None:
    """An XLM-RoBERTa with a classification head of one output, as bge-reranker has."""
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = tiny_tokenizer("roberta")
    config = tiny_config(XLMRobertaConfig, tokenizer, num_labels=1)
    write_model(folder, random_model(XLMRobertaForSequenceClassification, config, seed), tokenizer)


def tiny_decoder(folder: Path, seed: int = 0) -> None:
    """A Mistral whose tokenizer puts `<s>` before and `</s>` after a text, as e5-mistral's does."""
    from transformers import MistralConfig, MistralModel

    tokenizer = tiny_tokenizer("decoder")
    config = tiny_config(MistralConfig, tokenizer, num_key_value_heads=2, sliding_window=None)
    write_model(folder, random_model(MistralModel, config, seed), tokenizer)


def tiny_minicpm(folder: Path, seed: int = 0) -> None:
    """A MiniCPM-Embedding-Light as openbmb lays it out: grouped queries, LongRoPE, plain mean, a sparse head."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    tokenizer = tiny_tokenizer("decoder")
    model = random_model(LlamaModel, tiny_config(LlamaConfig, tokenizer, num_key_value_heads=2), seed)  # the same keys
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_minicpm_config(len(tokenizer))), encoding="utf-8")
    weights = dict(model.state_dict())
    # With a plain RMSNorm all tokens would be equally long, and rounding decide which is the longest of a text.
    weights["norm.weight"] = torch.linspace(0.5, 1.5, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    torch.save({"weight": torch.full((1, 32), 0.1), "bias": torch.tensor([1.0])}, folder / "sparse_linear.pt")


def tiny_yes_reranker(folder: Path, seed: int = 0) -> None:
    """A Gemma with its language-model head, as bge-reranker-v2-gemma has, whose tokenizer knows the prompt's words."""
    from transformers import GemmaConfig, GemmaForCausalLM

    tokenizer = _prompted_tokenizer()
    config = tiny_config(GemmaConfig, tokenizer, num_key_value_heads=1, head_dim=8)
    config.max_position_embeddings = 2 * MAX_LENGTH
    write_model(folder, random_model(GemmaForCausalLM, config, seed), tokenizer)


def tiny_layerwise(folder: Path, seed: int = 0) -> None:
    """A causal MiniCPM with a head after each of its two layers, as bge-reranker-v2-minicpm-layerwise is published."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaModel

    tokenizer = _prompted_tokenizer()
    body = random_model(LlamaModel, tiny_config(LlamaConfig, tokenizer, num_key_value_heads=2), seed)  # the same keys
    weights = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for number in range(2):
        weights[f"lm_head.{number}.linear_head.weight"] = torch.randn(1, 32, generator=generator)
    tokenizer.save_pretrained(folder)
    heads: dict[str, Any] = {"start_layer": 1, "head_multi": True, "head_type": "simple"}
    heads["architectures"] = ["LayerWiseMiniCPMForCausalLM"]
    config = {**_minicpm_config(len(tokenizer)), **heads, "max_position_embeddings": 2 * MAX_LENGTH}
    for name in ("is_causal", "adapt_mean_pooling", "rope_scaling"):  # an embedder's
        del config[name]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _prompted_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder's tokenizer with a token for each word of the rerankers' prompt, and room for it."""
    from ultrarag.adapters import RERANKER_PROMPT

    tokenizer = tiny_tokenizer("decoder", (*TEXTS, RERANKER_PROMPT))
    tokenizer.model_max_length = 2 * MAX_LENGTH
    return tokenizer


def _minicpm_config(vocabulary: int) -> dict[str, Any]:
    scaling = {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 4.0, 9.0],
        "original_max_position_embeddings": 16,
    }
    return {
        "architectures": ["MiniCPM"],
        "model_type": "minicpm",
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "is_causal": False,
        "adapt_mean_pooling": True,
    }


def tiny_tokenizer(style: str = "bert", texts: tuple[str, ...] = TEXTS) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over the words and letters of `texts`, with bert's, roberta's or a decoder's specials."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[style]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    letters = {*"abcdefghijklmnopqrstuvwxyz0123456789", *"".join(words)}
    # not the library's trainer, which breaks ties anew in every process: the same model has one fingerprint
    pieces = [*dict.fromkeys(special.values()), *sorted(words | letters), *sorted(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = _template(style, backend)
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **named)


def _template(style: str, backend: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    single, pair = {
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        "roberta": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "decoder": ("<s> $A </s>", "<s> $A </s> $B </s>"),
    }[style]
    tokens = dict.fromkeys(part.split(":")[0] for part in pair.split() if not part.startswith("$"))
    return TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, backend.token_to_id(token)) for token in tokens]
    )


def tiny_config(kind: Any, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Any:
    """A configuration of the class `kind`: hidden size 32, two layers, four heads, the tokenizer's vocabulary."""
    offset = (tokenizer.pad_token_id or 0) + 1 if "roberta" in kind.model_type else 0
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=MAX_LENGTH + offset,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # with the usual 0.02, two layers hardly distinguish texts
        **more,
    )


def random_model(kind: Any, config: Any, seed: int) -> PreTrainedModel:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(config)
    return model


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    from ultrarag.io import quiet_progress

    folder.mkdir(parents=True, exist_ok=True)
    with quiet_progress():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
