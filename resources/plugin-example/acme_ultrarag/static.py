"""Static embeddings: one trained vector per token of the vocabulary; a text is the mean of its tokens' vectors."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from ultrarag import Embeddings, hookimpl
from ultrarag.losses import embedding_loss


class StaticModel(torch.nn.Module):
    def __init__(self, table, tokenizer):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.tokenizer = tokenizer
        self.config = PretrainedConfig(hidden_size=table.shape[1])
        names = ("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        self.special = sorted({getattr(tokenizer, name) for name in names} - {None})


class StaticAdapter:
    heads = ("dense",)

    @hookimpl
    def load(self, path):
        """Load what `save` wrote; of any other checkpoint, take the token embeddings."""
        if (Path(path) / "config.json").is_file():
            table = AutoModel.from_pretrained(path, dtype=torch.float32).get_input_embeddings().weight.detach()
        else:
            table = load_file(Path(path) / "model.safetensors")["embedding.weight"]
        return StaticModel(table, AutoTokenizer.from_pretrained(path))

    @hookimpl
    def encode(self, model, features):
        ids, mask = features["input_ids"], features["attention_mask"]
        counts = mask * ~torch.isin(ids, torch.tensor(model.special, device=ids.device))
        total = (model.table[ids] * counts[:, :, None]).sum(1)
        return Embeddings(dense=F.normalize(total, dim=-1))  # the sum points where the mean does

    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        return embedding_loss(query, passage, teacher, step, args)

    @hookimpl
    def save(self, model, path, state_dict):
        """Write the layout of sentence-transformers' StaticEmbedding."""
        weights = {"embedding.weight": state_dict["table"].detach().cpu().contiguous()}
        save_file(weights, Path(path) / "model.safetensors")
        model.tokenizer.save_pretrained(path)
        kinds = {"": "StaticEmbedding", "1_Normalize": "Normalize"}
        modules = [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
            for i, (folder, kind) in enumerate(kinds.items())
        ]
        (Path(path) / "1_Normalize").mkdir()
        (Path(path) / "1_Normalize" / "config.json").write_text("{}")
        (Path(path) / "modules.json").write_text(json.dumps(modules))

    def example_model(self, folder):
        """Write a tiny model for the conformance kit."""
        from ultrarag.testing.tiny import tiny_bert

        tiny_bert(folder)


adapter = StaticAdapter()
