"""MiniCPM-Embedding from its formulas, in plain torch: one text at a time, no padding, no library's model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def hidden_states(weights: dict[str, Tensor], config: dict[str, Any], ids: list[int]) -> Tensor:
    """The last hidden states, (tokens, hidden), of one text."""
    residual = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    hidden = weights["embed_tokens.weight"][torch.tensor(ids)] * config["scale_emb"]
    cos, sin = angles(config, len(ids))
    for layer in range(config["num_hidden_layers"]):
        part = {
            name.removeprefix(f"layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        normed = rms_norm(hidden, part["input_layernorm.weight"], config)
        hidden = hidden + residual * attention(part, config, normed, cos, sin)
        normed = rms_norm(hidden, part["post_attention_layernorm.weight"], config)
        hidden = hidden + residual * feed_forward(part, normed)
    return rms_norm(hidden, weights["norm.weight"], config)


def rms_norm(hidden: Tensor, weight: Tensor, config: dict[str, Any]) -> Tensor:
    return hidden / (hidden.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def feed_forward(part: dict[str, Tensor], hidden: Tensor) -> Tensor:
    gate = hidden @ part["mlp.gate_proj.weight"].T
    return (gate * gate.sigmoid() * (hidden @ part["mlp.up_proj.weight"].T)) @ part["mlp.down_proj.weight"].T


def attention(part: dict[str, Tensor], config: dict[str, Any], hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every token sees every token; query head h reads key head h // (query heads / key heads)."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    query = hidden @ part["self_attn.q_proj.weight"].T
    key = hidden @ part["self_attn.k_proj.weight"].T
    value = hidden @ part["self_attn.v_proj.weight"].T
    out = []
    for head in range(heads):
        shared = head // (heads // groups)
        q = rotate(query[:, head * width : (head + 1) * width], cos, sin)
        k = rotate(key[:, shared * width : (shared + 1) * width], cos, sin)
        v = value[:, shared * width : (shared + 1) * width]
        out.append(torch.softmax(q @ k.T / math.sqrt(width), dim=-1) @ v)
    return torch.cat(out, dim=-1) @ part["self_attn.o_proj.weight"].T


def angles(config: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (tokens, width / 2): position m turns pair j by m / (factor_j theta^(2j / width))."""
    width = config["hidden_size"] // config["num_attention_heads"]
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequency, amplitude = config["rope_theta"] ** -exponent, 1.0
    scaling = config.get("rope_scaling")
    if scaling:
        longest, original = config["max_position_embeddings"], scaling["original_max_position_embeddings"]
        chosen = scaling["long_factor" if longest > original else "short_factor"]
        frequency = frequency / torch.tensor(chosen, dtype=torch.float64)
        amplitude = math.sqrt(1 + math.log(longest / original) / math.log(original))
    turned = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    return (turned.cos() * amplitude).float(), (turned.sin() * amplitude).float()


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pair j is (x_j, x_{j + width / 2})."""
    left, right = vectors.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def dense(hidden: Tensor) -> Tensor:
    """The mean weighted by position 1, 2, ..., of unit length."""
    weights = torch.arange(1, len(hidden) + 1, dtype=torch.float32)
    vector = (weights[:, None] * hidden).sum(0) / weights.sum()
    return vector / vector.norm()


def sparse(hidden: Tensor, ids: list[int], weight: Tensor, bias: Tensor) -> dict[int, float]:
    largest = max(float(vector.norm()) for vector in hidden)
    found: dict[int, float] = {}
    for token, vector in zip(ids, hidden, strict=True):
        value = max(0.0, float(vector @ weight[0] + bias[0]) / largest)
        if token not in (0, 1, 2, 73440) and value > found.get(token, 0.0):
            found[token] = value
    return found
