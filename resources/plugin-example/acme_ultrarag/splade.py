"""SPLADE: lexical weights log(1 + ReLU(logit)) of a masked language model, the largest over a text's tokens.

Source: SPLADE v2 (Formal et al., 2021), with max pooling.
"""

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ultrarag import Embeddings, Sparse, hookimpl
from ultrarag.losses import embedding_loss


class SpladeModel(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.backbone = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.config = self.backbone.config


class SpladeAdapter:
    heads = ("sparse",)

    @hookimpl
    def load(self, path):
        return SpladeModel(path)

    @hookimpl
    def encode(self, model, features):
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        logits = model.backbone(**inputs).logits
        weights = torch.log1p(torch.relu(logits)) * inputs["attention_mask"][:, :, None]
        return Embeddings(sparse=_nonzero(weights.amax(1)))

    @hookimpl
    def loss(self, query, passage, teacher, step, args):
        return embedding_loss(query, passage, teacher, step, args)

    @hookimpl
    def save(self, model, path, state_dict):
        weights = {name.removeprefix("backbone."): tensor for name, tensor in state_dict.items()}
        model.backbone.save_pretrained(path, state_dict=weights)
        model.tokenizer.save_pretrained(path)

    def example_model(self, folder):
        """Write a tiny model for the conformance kit."""
        from ultrarag.testing.tiny import tiny_masked_lm

        tiny_masked_lm(folder)


def _nonzero(weights):
    """(batch, vocabulary) weights as token ids, ascending, and their weights, as wide as the fullest row."""
    there = weights > 0
    width = max(1, int(there.sum(1).max()))
    ids = (~there).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    there = there.gather(1, ids)
    return Sparse(torch.where(there, ids, Sparse.PAD_ID), weights.gather(1, ids) * there)


adapter = SpladeAdapter()
