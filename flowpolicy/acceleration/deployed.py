"""A sampler as programs and processes name it: the checkpoint, how to sample, and where."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch

from flowpolicy.acceleration.sampler import Sampler, build_sampler
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.ranges import PositiveInt, at_most
from flowpolicy.runs.device import resolve_device

S = TypeVar("S", bound=SamplerSpec)
MOST_THREADS = 1024
_BUILDING = threading.Lock()  # torch's exporter and compiler are not made for two threads at once


@dataclass(frozen=True, kw_only=True)
class DeployedSampler(SamplerSpec):
    """What a sampler for one chunk at a time is built from; it can be sent to another process.

    Attributes:
        checkpoint: folder of the policy.
        device: of the policy; ``auto`` takes a GPU where there is one.
        threads: CPU threads of one chunk.
    """

    checkpoint: str
    device: str = "auto"
    threads: Annotated[PositiveInt, at_most(MOST_THREADS)] = 1

    def build(self, exports: dict[str, bytes] | None = None) -> Sampler:
        """The sampler.

        Args:
            exports: see :func:`~flowpolicy.acceleration.sampler.build_sampler`.

        Raises:
            FlowPolicyError: the checkpoint, a setting or the backend is not usable.
        """
        with _BUILDING:
            torch.set_num_threads(self.threads)
            policy = FlowPolicy.load(self.checkpoint, resolve_device(self.device))
            return build_sampler(policy, only(self, SamplerSpec), exports=exports)


def only(settings: SamplerSpec, cls: type[S]) -> S:
    """The entries of ``settings`` that the base class ``cls`` has."""
    return cls(**{item.name: getattr(settings, item.name) for item in dataclasses.fields(cls)})
