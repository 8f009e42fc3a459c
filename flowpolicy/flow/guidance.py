"""Guidance: modifies the velocity field while a chunk is sampled.

A guidance is a *velocity transform*: it wraps the field that a solver integrates. It knows neither the
network nor the solver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from flowpolicy.errors import ConfigError
from flowpolicy.flow.network import Velocity
from flowpolicy.settings import Settings, build, choose, require

Transform = Callable[[Velocity], Velocity]


@dataclass(frozen=True)
class GuidedChunk:
    """The chunks that are being sampled, as a guidance sees them.

    Attributes:
        noise: x_0 ``(B, T, A')``, of as many numbers as the network learns of a command.
        normalize: commands ``(B, T, A)`` to normalised actions of the shape of x_0.
        physical: normalised actions to commands ``(B, T, A)``, with gradients.
        finish: the same for the chunk that is given out, within the policy's bounds.
        options: what the caller of ``act`` gave for it, by name.
        observation: key -> ``(B, T_o, *shape)``, in physical units.
    """

    noise: Tensor
    normalize: Callable[[Tensor], Tensor]
    physical: Callable[[Tensor], Tensor]
    finish: Callable[[Tensor], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    observation: Mapping[str, Tensor] = field(default_factory=dict)


class Guidance(Settings, ABC, prefix="guidance"):
    """Changes where the flow ends.

    Attributes:
        name: in settings.
        options: keywords of ``act`` that it reads.
        solver: the only one that it is defined for, and the one taken where none is named; None for any.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    solver: ClassVar[str | None] = None

    def check(self, solver: str) -> None:
        """Raise a ConfigError where it does not go together with a solver."""
        allowed = f"{self.solver}: the guidance '{self.name}' is defined for it alone"
        require(self.solver in (None, solver), "solver", solver, allowed)

    @abstractmethod
    def bend(self, velocity: Velocity, chunk: GuidedChunk) -> Velocity:
        """The field to integrate in place of ``velocity``; both take normalised x ``(B, T, A)``, t and h."""

    def sample(self, integrate: Callable[[Transform | None], Tensor], chunk: GuidedChunk) -> Tensor:
        """The normalised chunk; ``integrate`` solves the flow from x_0, its field transformed or not."""
        return integrate(lambda velocity: self.bend(velocity, chunk))


GUIDANCES: dict[str, type[Guidance]] = {}


def build_guidance(settings: Mapping[str, Any] | None) -> Guidance | None:
    """A guidance from a mapping with ``name`` and that guidance's settings; None where there is none."""
    if not settings:
        return None
    from flowpolicy.flow import prefix_guidance  # noqa: F401 - it registers itself

    values = dict(settings)
    cls = choose(GUIDANCES, str(values.pop("name", "")), "guidance.name")
    return build(cls, values, "guidance")


def refuse_options(guidance: Guidance | None, options: Mapping[str, Any]) -> None:
    """Raise a ConfigError where a caller gives what no guidance of the sampler reads."""
    for name in options:
        if guidance is None or name not in guidance.options:
            raise ConfigError(
                f"This sampler does not take {name}; build one with a guidance that reads it, such as "
                "guidance={'name': 'prefix'} for prefix."
            )
