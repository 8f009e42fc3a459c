"""The interface of a velocity network: two calls, used by training, sampling, fine-tuning and export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor
from torch.utils._pytree import tree_map

Context = Any
"""What a network makes of an observation: tensors of B rows in any nesting."""

Velocity = Callable[[Tensor, float, float], Tensor]
"""v(x, t, h) ``(B, T, A)``: the velocity for a step of length h from t, for one context."""


class Network(Protocol):
    """A conditional velocity field v(x_t, t, d, o) over [t, t + d]; everything is in normalised units."""

    def encode(self, observation: Mapping[str, Tensor]) -> Context:
        """Whatever depends on the observation alone, key -> ``(B, T_o, *shape)``."""
        ...

    def velocity(self, x: Tensor, t: Tensor, d: Tensor, context: Context) -> Tensor:
        """v ``(B, T, A)``.

        Args:
            x: noisy chunks ``(B, T, A)``.
            t: flow times ``(B,)`` or ``(1,)``, 0 = noise.
            d: step sizes ``(B,)`` or ``(1,)``; 0 asks for the instantaneous velocity.
            context: of ``encode``.
        """
        ...


class SharesContext(Protocol):
    """A network that evaluates N times of the flow at once for the same B observations."""

    def velocities(self, x: Tensor, t: Tensor, d: Tensor, context: Context) -> Tensor:
        """v ``(N, B, T, A)`` for ``x`` ``(N, B, T, A)`` and ``t``, ``d`` ``(N,)``."""
        ...


def velocities(network: Network, x: Tensor, t: Tensor, d: Tensor, context: Context) -> Tensor:
    """v ``(N, B, T, A)`` at N times, ``x`` ``(N, B, T, A)``, ``t`` and ``d`` ``(N,)``, in one forward pass.

    The context of B rows is repeated, unless the network can share it (:class:`SharesContext`).
    """
    if hasattr(network, "velocities"):
        shared = cast("SharesContext", network)
        return shared.velocities(x, t, d, context)
    times, rows = x.shape[:2]
    repeated = tree_map(lambda part: part.repeat(times, *[1] * (part.ndim - 1)), context)
    t, d = t.repeat_interleave(rows), d.repeat_interleave(rows)
    return network.velocity(x.flatten(0, 1), t, d, repeated).view(times, rows, *x.shape[2:])


def field(network: Network, context: Context, step_size: Callable[[float], float]) -> Velocity:
    """The velocity field of a network for one context, as samplers integrate it.

    Args:
        network: the network.
        context: of its ``encode``.
        step_size: the d that it is asked for in a step of length h.
    """

    def velocity(x: Tensor, t: float, h: float) -> Tensor:
        return network.velocity(x, x.new_full((1,), t), x.new_full((1,), step_size(h)), context)

    return velocity


def tabulated(network: Network, t: Tensor, d: Tensor) -> Callable[[int, Tensor, Context], Tensor]:
    """v of the k-th of N times and step sizes ``(N,)``, what depends on these alone computed once.

    That is the modulations of a network that has them (:class:`~flowpolicy.models.blocks.AddressableBlocks`).
    """
    if not hasattr(network, "modulations"):
        return lambda k, x, context: network.velocity(x, t[k : k + 1], d[k : k + 1], context)
    own = cast("Any", network)
    blocks, last = own.modulations(t, d)
    return lambda k, x, context: own.modulated(x, (blocks[k : k + 1], last[k : k + 1]), context)


def encode_images(network: Network, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The observation with images replaced by the network's tokens ``(B, num_tokens, d)``, where it has any:
    what several readers of an observation share.
    """
    encode = getattr(network, "encode_images", None)
    return dict(observation) if encode is None else encode(observation)
