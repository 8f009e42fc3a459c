"""The residual branches of the velocity network: self-attention, cross-attention, feed-forward.

Each branch is an addressable block: it takes the residual stream and returns its *gated* output, and the
caller adds it. Whatever a block needs besides the stream (its modulation, its keys and values) is passed
in, so that a sampler can compute those once and cache, skip or fuse the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.models.config import ModelConfig


class KeyValue(NamedTuple):
    """Cross-attention keys and values of the observation tokens for one layer, each ``(B, H, S, d/H)``."""

    key: Tensor
    value: Tensor


class Dropout(nn.Module):
    """Dropout whose CPU mask costs a quarter of PyTorch's, which draws one word of randomness an element.

    Here a 64-bit word serves four elements, 16 bits each; the probability is rounded to 1/65536.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with the probability and scale the rest; the identity outside training."""
        if not self.training or self.probability == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = (lanes >= round(self.probability * 2**16) - 2**15).to(x.dtype)
        return x * keep.mul_(1.0 / (1.0 - self.probability))


class Branch(nn.Module):
    """adaLN-zero around an inner transform: ``gate * f(shift + (1 + scale) * norm(x))``.

    Peebles and Xie 2023 (DiT), section 3.2. ``modulation`` is ``(B or 1, 3, d)``: shift, scale, gate.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.width
        self.dropout = Dropout(config.dropout)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """The inner transform, ``(B, T, d) -> (B, T, d)``."""
        raise NotImplementedError

    def forward(self, x: Tensor, modulation: Tensor, context: KeyValue) -> Tensor:
        """The gated output ``(B, T, d)``, to be added to ``x``."""
        shift, scale, gate = modulation[:, 0:1], modulation[:, 1:2], modulation[:, 2:3]
        tokens = shift + F.layer_norm(x, (self.width,)) * (1 + scale)
        gated: Tensor = gate * self.dropout(self.transform(tokens, context))
        return gated


class QKNorm(nn.Module):
    """Layer norm over each head's channels with a learned scale (Dehghani et al. 2023, ViT-22B)."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.layer_norm(heads, (heads.shape[-1],), self.weight)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d_h)) v for ``(B, H, T, d_h)`` and ``(B, H, S, d_h)``."""
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # On a CPU the backward pass of attention is many times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return F.scaled_dot_product_attention(query, key, value)


class SelfAttention(Branch):
    """Bidirectional attention over the T action tokens, queries and keys normalised."""

    kind = "SA"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.query_norm = QKNorm(config.width // config.num_heads)
        self.key_norm = QKNorm(config.width // config.num_heads)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Attention among the action tokens; ``context`` is not used."""
        batch, length, width = tokens.shape
        heads = self.qkv(tokens).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attend(self.query_norm(query), self.key_norm(key), value)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class CrossAttention(Branch):
    """Attention from the action tokens to the observation tokens, whose keys and values come ready-made."""

    kind = "CA"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.query_norm = QKNorm(config.width // config.num_heads)
        self.key_norm = QKNorm(config.width // config.num_heads)

    def project(self, observation_tokens: Tensor) -> KeyValue:
        """Keys and values of the observation tokens ``(B, S, d)``; once per observation."""
        batch, length, width = observation_tokens.shape
        heads = self.key_value(observation_tokens).view(
            batch, length, 2, self.num_heads, width // self.num_heads
        )
        key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return KeyValue(self.key_norm(key), value)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Attention to the observation's keys and values."""
        batch, length, width = tokens.shape
        query = (
            self.query(tokens).view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
        )
        mixed = attend(self.query_norm(query), context.key, context.value)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class FeedForward(Branch):
    """Two linear layers with a GELU between."""

    kind = "FFN"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.expand = nn.Linear(config.width, config.feedforward_ratio * config.width)
        self.contract = nn.Linear(config.feedforward_ratio * config.width, config.width)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Token by token; ``context`` is not used."""
        hidden = self.dropout(F.gelu(self.expand(tokens), approximate="tanh"))
        result: Tensor = self.contract(hidden)
        return result
