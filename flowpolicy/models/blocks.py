"""The residual branches of the velocity network: self-attention, cross-attention, feed-forward.

Each branch is an addressable block: it takes the residual stream and returns its *gated* output, and the
caller adds it. Whatever a block needs besides the stream (its modulation, its keys and values) is passed
in, so that a sampler can compute those once and cache, skip or fuse the rest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpolicy.models.config import TransformerConfig


class KeyValue(NamedTuple):
    """Cross-attention keys and values of the observation tokens for one layer, each ``(B, H, S, d/H)``."""

    key: Tensor
    value: Tensor


class Modulation(NamedTuple):
    """adaLN parameters of one block, ``(d,)`` or broadcastable to its tokens; ``factor`` is 1 + scale."""

    shift: Tensor
    factor: Tensor
    gate: Tensor

    @classmethod
    def of_blocks(cls, table: Tensor, ndim: int) -> list[Modulation]:
        """Of every block in ``(N, blocks, 3, d)``, shift, scale and gate, for tokens of ``ndim`` axes."""
        parts = spread(table.flatten(1, 2), ndim)
        return [cls(parts[i], 1 + parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]


class _DropPositions(torch.autograd.Function):
    """Zeroes elements at given flat positions and scales the rest; so does its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, scale: float) -> Tensor:
        """``x`` of any shape, ``positions`` ``(N,)`` into its flattened form."""
        ctx.save_for_backward(positions)
        ctx.scale = scale
        return _drop(x, positions, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The same linear map; positions and scale have no gradient."""
        (positions,) = ctx.saved_tensors
        return _drop(gradients[0], positions, ctx.scale), None, None


def _drop(x: Tensor, positions: Tensor, scale: float) -> Tensor:
    result = torch.mul(x, scale).contiguous()
    result.view(-1).index_fill_(0, positions, 0.0)
    return result


class Dropout(nn.Module):
    """Dropout that draws, on a CPU and for small probabilities, the dropped positions and no mask.

    PyTorch draws a random number for each element on one thread, which takes longer than the matrix product
    before it. The gaps between dropped elements of independent Bernoulli trials are geometric, so that
    about probability * elements draws give the same distribution.
    """

    SPARSE = 0.15  # above this a mask is as cheap

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with the probability and scale the rest; the identity outside training."""
        p = self.probability
        if not self.training or p == 0.0:
            return x
        if x.device.type != "cpu" or p > self.SPARSE:
            return F.dropout(x, p)
        positions, scale = bernoulli_positions(p, x.numel()), 1.0 / (1.0 - p)
        kept: Tensor = _DropPositions.apply(x, positions, scale)  # type: ignore[no-untyped-call]
        return kept


def bernoulli_positions(probability: float, count: int) -> Tensor:
    """The successes among ``count`` independent trials, ascending, int64 on the CPU."""
    expected = probability * count
    draws = int(expected + 6.0 * math.sqrt(expected) + 16)  # enough but for one time in a billion
    last, parts = -1, []
    while last < count:
        part = torch.empty(draws, dtype=torch.int64).geometric_(probability).cumsum(0).add_(last)
        parts.append(part)
        last = int(part[-1])
    positions = torch.cat(parts) if len(parts) > 1 else parts[0]
    return positions[: int(torch.searchsorted(positions, count))]


class Branch(nn.Module):
    """adaLN-zero around an inner transform: ``gate * f(shift + (1 + scale) * norm(x))``.

    Peebles and Xie 2023 (DiT), section 3.2. Tokens may have more axes, ``(N, ..., T, d)``, where many rows
    share each of N modulations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.dropout = Dropout(config.dropout)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """The inner transform, ``(B, T, d) -> (B, T, d)``."""
        raise NotImplementedError

    def forward(self, x: Tensor, modulation: Modulation, context: KeyValue) -> Tensor:
        """The gated output ``(B, T, d)``, to be added to ``x``."""
        tokens = modulate(x, modulation.shift, modulation.factor)
        result: Tensor = modulation.gate * self.dropout(self.transform(tokens, context))
        return result


def spread(modulation: Tensor, ndim: int) -> tuple[Tensor, ...]:
    """The parts of ``(N, parts, d)``, each ``(d,)`` if N is 1, or ``(N, 1, .., 1, d)`` of ``ndim`` axes."""
    rows, parts, width = modulation.shape
    if rows == 1:
        return modulation[0].unbind(0)
    return modulation.view(rows, parts, *(1,) * (ndim - 2), width).unbind(1)


def modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Layer norm of the last axis, times ``factor``, plus ``shift``."""
    if factor.ndim == 1:  # the same for all rows: one kernel does it all
        return F.layer_norm(x, x.shape[-1:], factor, shift)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), factor)


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
    reduced = query.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if reduced or torch.onnx.is_in_onnx_export():
        # The fused kernel's backward pass is slow in bfloat16, and its ONNX form has many more operators.
        weights = torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=-1)
        return weights @ value
    return F.scaled_dot_product_attention(query, key, value)


def split_heads(heads: Tensor, *norms: QKNorm) -> list[Tensor]:
    """The parts of ``(B, T, parts, H, d_h)`` as ``(B, H, T, d_h)``, the first ones normalised."""
    is_exported = torch.onnx.is_in_onnx_export()  # a graph has no views: one transposition for all
    parts = list(heads.permute(2, 0, 3, 1, 4).unbind(0) if is_exported else heads.unbind(2))
    for index, norm in enumerate(
        norms
    ):  # contiguous where they are not transposed yet, and so are the gradients
        parts[index] = norm(parts[index])
    return parts if is_exported else [part.transpose(1, 2) for part in parts]


class SelfAttention(Branch):
    """Bidirectional attention over the action tokens, queries and keys normalised."""

    kind = "SA"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)
        self.query_norm = QKNorm(config.width // config.num_heads)
        self.key_norm = QKNorm(config.width // config.num_heads)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Attention among the action tokens; ``context`` is not used."""
        length, width = tokens.shape[-2:]
        if length == 1:  # a token alone attends to itself: what is mixed is its value
            value = F.linear(tokens, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])
            alone: Tensor = self.output(value)
            return alone
        heads = self.qkv(tokens).view(-1, length, 3, self.num_heads, width // self.num_heads)
        mixed = attend(*split_heads(heads, self.query_norm, self.key_norm))
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(tokens.shape))
        return result


class CrossAttention(Branch):
    """Attention from the action tokens to the observation tokens, whose keys and values come ready-made."""

    kind = "CA"

    def __init__(self, config: TransformerConfig) -> None:
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
        return KeyValue(*split_heads(heads, self.key_norm))

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Attention to the observation's keys and values, which tokens ``(N, B, T, d)`` share N times."""
        rows, heads, _, head_width = context.key.shape
        length = tokens.shape[-2]
        query = self.query_norm(self.query(tokens).view(-1, rows, length, heads, head_width))
        query = query.permute(1, 3, 0, 2, 4).flatten(2, 3)
        mixed = attend(query, context.key, context.value).reshape(rows, heads, -1, length, head_width)
        result: Tensor = self.output(mixed.permute(2, 0, 3, 1, 4).reshape(tokens.shape))
        return result


class FeedForward(Branch):
    """Two linear layers with a GELU between."""

    kind = "FFN"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.expand = nn.Linear(config.width, config.feedforward_ratio * config.width)
        self.contract = nn.Linear(config.feedforward_ratio * config.width, config.width)

    def transform(self, tokens: Tensor, context: KeyValue) -> Tensor:
        """Token by token; ``context`` is not used."""
        hidden = self.dropout(F.gelu(self.expand(tokens), approximate="tanh"))
        result: Tensor = self.contract(hidden)
        return result


class Block(NamedTuple):
    """The address of a residual branch: its layer, its kind (SA, CA or FFN) and the module."""

    layer: int
    kind: str
    module: Branch


class AddressableBlocks(ABC):
    """The capability of a network to be computed block by block, which caching, tabulated modulations and
    compilation by region need.

    Its context is a list with an entry for each layer, which is handed to that layer's blocks; the residual
    stream goes from ``embed`` through the blocks to ``readout``.
    """

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Every residual branch in the order of computation."""

    @abstractmethod
    def modulations(self, t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """adaLN parameters at flow times and step sizes ``(N,)``, N being the batch or 1.

        Returns:
            ``(N, blocks, 3, d)``, shift, scale and gate in the order of ``blocks()``, and ``(N, 2, d)`` for
            the readout.
        """

    @abstractmethod
    def embed(self, x: Tensor) -> Tensor:
        """The residual stream ``(B, n, d)`` of n tokens at the first block, for a normalised noisy chunk
        ``(B, T, A)``."""

    @abstractmethod
    def readout(self, h: Tensor, modulation: Tensor) -> Tensor:
        """v ``(B, T, A)`` from the stream after the last block; ``modulation`` is ``(B or 1, 2, d)``."""

    def modulated(self, x: Tensor, modulations: tuple[Tensor, Tensor], context: list[KeyValue]) -> Tensor:
        """v ``(B, T, A)`` from modulations; for N of them at once from ``x`` ``(N, B, T, A)``, with B rows of
        context."""
        per_block, last = modulations
        h = self.embed(x)
        each = Modulation.of_blocks(per_block, h.ndim)  # in one go: its gradient is put together once
        for modulation, block in zip(each, self.blocks(), strict=True):
            h = h + block.module(h, modulation, context[block.layer])
        return self.readout(h, last)

    def velocity(self, x: Tensor, t: Tensor, d: Tensor, context: list[KeyValue]) -> Tensor:
        """v ``(B, T, A)``; see :class:`flowpolicy.flow.network.Network`."""
        return self.modulated(x, self.modulations(t, d), context)

    def velocities(self, x: Tensor, t: Tensor, d: Tensor, context: list[KeyValue]) -> Tensor:
        """v ``(N, B, T, A)``; see :class:`flowpolicy.flow.network.SharesContext`."""
        return self.modulated(x, self.modulations(t, d), context)
