"""The adapters of models that encode texts: their hooks, free of torch, so that listing plugins is quick."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ultrarag.claims import Answer, Claim, ModelFolder, Refusal, library_module
from ultrarag.hookspecs import Features, LoadOptions, hookimpl
from ultrarag.types import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ultrarag.adapters.colbert_model import ColBERT
    from ultrarag.adapters.embedder import Embedder
    from ultrarag.adapters.minicpm_model import MiniCPMEmbedder
    from ultrarag.adapters.sentence_transformers_model import SentenceTransformersModel
    from ultrarag.adapters.static_model import StaticEmbedder
    from ultrarag.loss_arguments import LossArguments


#: What to do with a model of which only the encoder would be run.
_SAVE_FIRST = (
    ", which is run once it is saved by sentence-transformers: SentenceTransformer(path).save_pretrained(folder)"
)


def refused_by_embedder(folder: ModelFolder) -> Refusal | None:
    """Why a folder cannot be an `Embedder`: another kind of model, or modules that are unknown here."""
    from ultrarag.adapters.sentence_transformers_files import OtherModules, read_declaration
    from ultrarag.errors import CheckpointError

    family = folder.family
    if family.name not in ("dense", "body", "causal-lm", "encoder-decoder"):
        return Refusal(str(family))
    half = any("EncoderModel" in name for name in folder.architectures)  # such as T5EncoderModel
    if family.name == "encoder-decoder" or half or folder.config.get("is_encoder_decoder"):
        return Refusal(
            f"{family} over an encoder with a decoder (config.json: model_type {folder.model_type})"
            + ("" if folder.modules else _SAVE_FIRST)
        )
    if folder.modules and "Pooling" not in {library_module(row["type"]) for row in folder.modules}:
        return Refusal(f"{family}, without a Pooling module of that library")
    try:
        read_declaration(folder.path)
    except OtherModules as error:
        return Refusal(f"{family}; {error}")
    except CheckpointError:  # damaged, of which the loader tells
        pass
    return None


class EmbedderAdapter:
    """The hooks of models with `encode(features)`, such as `Embedder`; subclasses say which heads theirs may have."""

    contract = 2
    heads: tuple[str, ...] = ("dense",)

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone and the heads that it has."""
        from ultrarag.adapters.embedder_files import load_embedder

        return load_embedder(path, options, self.heads)

    @hookimpl
    def encode(self, model: nn.Module, features: Features) -> Embeddings:
        """Run the model's one forward."""
        return cast("Embedder", model).encode(features)

    @hookimpl
    def loss(
        self, query: Embeddings, passage: Embeddings, teacher: Tensor | None, step: int, args: LossArguments
    ) -> Tensor:
        """The contrastive or distillation loss of every head that was encoded."""
        from ultrarag.losses import embedding_loss

        return embedding_loss(query, passage, teacher, step, args)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what transformers, sentence-transformers and FlagEmbedding load."""
        from ultrarag.adapters.embedder_files import save_embedder

        save_embedder(cast("Embedder", model), path, state_dict)


class BGEAdapter(EmbedderAdapter):
    """One dense vector per text: bge, e5, gte, MiniLM and whatever `modules.json` of the same kind describes.

    Pooling (cls, mean, last_token, weighted_mean), prompts and normalisation are as the checkpoint declares.
    """

    heads = ("dense",)
    threaded_encode = True

    def claims(self, folder: ModelFolder) -> Answer:
        """Modules of sentence-transformers that are known here; and any encoder, if nobody claims more."""
        if refusal := refused_by_embedder(folder):
            return refusal
        family = folder.family
        levels: dict[str, Any] = {"dense": "kind", "body": "could"}
        return Claim(family.evidence, levels[family.name]) if family.name in levels else None


class BGEM3Adapter(EmbedderAdapter):
    """BAAI/bge-m3, or the same heads over any encoder: CLS, lexical weights, and one ColBERT vector per token.

    Source:
        M3-Embedding (Chen et al., 2024); head files as in FlagEmbedding 1.4.2.
    """

    heads = ("dense", "sparse", "colbert")
    threaded_encode = True

    def claims(self, folder: ModelFolder) -> Answer:
        """The files of its heads."""
        found = [name for name in ("sparse_linear.pt", "colbert_linear.pt") if folder.has(name)]
        if refusal := refused_by_embedder(folder):
            return refusal
        return Claim(", ".join(found), "exact") if found and folder.model_type != "minicpm" else None


class ICLAdapter(EmbedderAdapter):
    """A causal backbone whose vector is the hidden state of the end token: bge-en-icl, e5-mistral and their like.

    The end token closes every text. The instruction says what the query is for; it comes from the run, the call, or a
    row's `prompt`, and is put into the format that the model was trained with. Few-shot examples, which bge-en-icl can
    read, are a `query_format` that begins with them. Passages are raw.

    Source:
        bge-en-icl (Li et al., 2024); e5-mistral-7b-instruct (Wang et al., 2024).
    """

    heads = ("dense",)

    def claims(self, folder: ModelFolder) -> Answer:
        """The tokens of bge-en-icl's format, which its tokenizer has and no other."""
        if refusal := refused_by_embedder(folder):
            return refusal
        added = folder.json("tokenizer_config.json").get("added_tokens_decoder") or {}
        tokens = {*folder.json("added_tokens.json"), *(str(row.get("content")) for row in added.values())}
        return Claim("its tokenizer has <instruct>", "exact") if {"<instruct>", "<query>"} <= tokens else None

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone, and see to it that its tokenizer ends each text with the end token."""
        from ultrarag.adapters.icl_model import load_icl

        return load_icl(path, options, self.heads)


class MiniCPMAdapter(EmbedderAdapter):
    """MiniCPM-Embedding (dense) and its Light (dense and sparse) as a stock transformers model: no remote code.

    Queries are read as `Query: {query}`; an instruction given to a fine-tuning run
    (`--query_instruction_for_retrieval`) as `Instruction: {instruction} Query: {query}`; passages are raw.

    Source:
        Model cards of openbmb/MiniCPM-Embedding and openbmb/MiniCPM-Embedding-Light.
    """

    heads = ("dense", "sparse")
    finetune_defaults = {"query_instruction_format": "Instruction: {} Query: {}"}  # noqa: RUF012

    def claims(self, folder: ModelFolder) -> Answer:
        """The model type of openbmb's embedders; what was saved here is a Granite."""
        family = folder.family
        if folder.model_type not in ("minicpm", "granite") or family.name not in ("dense", "body", "causal-lm"):
            return Refusal(str(family))
        ours = folder.model_type == "minicpm" and family.name != "causal-lm"
        return Claim("config.json: model_type minicpm", "exact") if ours else None

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load a published checkpoint, or one that was fine-tuned here."""
        from ultrarag.adapters.minicpm_model import load_minicpm

        return load_minicpm(path, options, self.heads)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write a Granite checkpoint that transformers and sentence-transformers load without remote code."""
        from ultrarag.adapters.minicpm_model import save_minicpm

        save_minicpm(cast("MiniCPMEmbedder", model), path, state_dict)


class StaticAdapter(EmbedderAdapter):
    """Static embeddings: a text's vector is the mean of its tokens' trained rows; no transformer at all.

    Source:
        StaticEmbedding of sentence-transformers; model2vec (potion), of which unknown tokens count, as they do there.
    """

    heads = ("dense",)
    threaded_encode = True

    def claims(self, folder: ModelFolder) -> Answer:
        """A StaticEmbedding with or without Normalize, or a model2vec."""
        family = folder.family
        return Claim(family.evidence) if family.name == "static" else Refusal(str(family))

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the table and its tokenizer."""
        from ultrarag.adapters.static_model import load_static

        return load_static(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write what sentence-transformers loads, and model2vec where it came from there."""
        from ultrarag.adapters.static_model import save_static

        save_static(cast("StaticEmbedder", model), path, state_dict)


class ColBERTAdapter(EmbedderAdapter):
    """Late interaction: one vector per token, a passage scored by the best match of each of the query's tokens.

    The layouts of PyLate, of Stanford (HF_ColBERT) and of sentence-transformers' MultiVectorEncoder, each saved as it
    came. Markers, query expansion and the skiplist are as the files declare.

    Source:
        ColBERT (Khattab and Zaharia, 2020); ColBERTv2 (Santhanam et al., 2022).
    """

    heads = ("colbert",)
    threaded_encode = True

    def claims(self, folder: ModelFolder) -> Answer:
        """Any late-interaction model whose modules are run here."""
        from ultrarag.adapters.colbert_files import read_late_interaction
        from ultrarag.adapters.sentence_transformers_files import OtherModules
        from ultrarag.errors import CheckpointError

        family = folder.family
        if family.name != "late-interaction":
            return Refusal(str(family))
        try:
            read_late_interaction(folder.path)
        except OtherModules as error:
            return Refusal(f"{family}; {error}")
        except CheckpointError:  # damaged, of which the loader tells
            pass
        return Claim(family.evidence)

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Load the backbone, the projection, and how texts are read."""
        from ultrarag.adapters.colbert_model import load_colbert

        return load_colbert(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Write the layout that the model came in."""
        from ultrarag.adapters.colbert_model import save_colbert

        save_colbert(cast("ColBERT", model), path, state_dict)


class SentenceTransformersAdapter(EmbedderAdapter):
    """Any checkpoint of that library, run by its own modules, whatever `modules.json` lists.

    A model has one head: dense, or for a SparseEncoder sparse, whose token ids are the dimensions of its vector.
    The adapter `bge` is faster for models of Transformer, Pooling, Dense and Normalize alone: it computes no padding.
    """

    heads = ("dense", "sparse")

    def claims(self, folder: ModelFolder) -> Answer:
        """Sparse encoders, Routers, and whatever modules no other adapter runs.

        A masked language model without modules is a SPLADE where its card says so, and may become one where it does
        not.
        """
        family = folder.family
        masked = any("ForMaskedLM" in name for name in folder.architectures)
        if family.name == "body" and masked and not folder.modules:
            return None
        if family.name not in ("dense", "sparse", "router") or not (folder.modules or masked):
            return Refusal(str(family))
        return Claim(family.evidence, "could" if family.name == "dense" else "kind")

    @hookimpl
    def load(self, path: str, options: LoadOptions) -> nn.Module:
        """Let sentence-transformers load its modules."""
        from ultrarag.adapters.sentence_transformers_model import load_model

        return load_model(path, options)

    @hookimpl
    def save(self, model: nn.Module, path: str, state_dict: Mapping[str, Any]) -> None:
        """Let sentence-transformers save its modules."""
        from ultrarag.adapters.sentence_transformers_model import save_model

        save_model(cast("SentenceTransformersModel", model), path, state_dict)


bge = BGEAdapter()
bgem3 = BGEM3Adapter()
icl = ICLAdapter()
minicpm = MiniCPMAdapter()
static = StaticAdapter()
colbert = ColBERTAdapter()
sentence_transformers = SentenceTransformersAdapter()
