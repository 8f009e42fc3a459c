"""Networks by name: their arguments, and how a user's own is added."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from flowpolicy.settings import Settings, build, choose
from flowpolicy.spec import PolicySpec


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Settings, prefix="model"):
    """Settings of a network; each network has a subclass of its own.

    Attributes:
        network: name of the network.
    """

    network: str

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], where: str) -> NetworkConfig:
        """The config of the network that ``values`` name, a transformer where they name none.

        Raises:
            ConfigError: an unknown network, or settings that it does not have.
        """
        if cls is not NetworkConfig:
            return build(cls, values, where)
        return build(network_class(str(values.get("network", "transformer"))).Config, values, where)


class VelocityNetwork(nn.Module, ABC):
    """A conditional velocity field, built from its settings and the policy's description.

    Anything else that a network has is a capability: to evaluate several times at once
    (:class:`~flowpolicy.flow.network.SharesContext`), addressable blocks for caching
    (:class:`~flowpolicy.models.blocks.AddressableBlocks`), images encoded apart (``encode_images``).

    Args:
        config: its settings.
        spec: its observations and actions.
        levels: step sizes that the objective tells apart; 1 where only d = 0 is asked for.
    """

    name: ClassVar[str]
    Config: ClassVar[type[NetworkConfig]]

    def __init__(self, config: Any, spec: PolicySpec, levels: int) -> None:
        super().__init__()

    @abstractmethod
    def encode(self, observation: Mapping[str, Tensor]) -> Any:
        """Whatever depends on the observation alone, normalised, key -> ``(B, T_o, *shape)``."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, d: Tensor, context: Any) -> Tensor:
        """v ``(B, T, A)``; see :class:`flowpolicy.flow.network.Network`."""


NETWORKS: dict[str, type[VelocityNetwork]] = {}


def network_class(name: str) -> type[VelocityNetwork]:
    """The network of this name."""
    from flowpolicy.models import mlp, transformer  # noqa: F401 - they register themselves

    return choose(NETWORKS, name, "model.network")


def build_network(config: NetworkConfig, spec: PolicySpec, levels: int) -> VelocityNetwork:
    """A network with random weights."""
    return network_class(config.network)(config, spec, levels)
