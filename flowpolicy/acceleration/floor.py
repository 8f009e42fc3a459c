"""The least time that a chunk can take: its arithmetic and its bytes at the machine's measured limits."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from flowpolicy.acceleration.engine import random_observations
from flowpolicy.acceleration.sampler import Sampler, build_engine

LAUNCH_SECONDS = 1.25e-6
"""Cost of one kernel in a CUDA graph."""


@dataclass(frozen=True)
class Machine:
    """Measured limits of the threads in use, float32.

    Attributes:
        flops: floating-point operations a second of a large matrix product.
        bandwidth: bytes a second read from memory.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Floor:
    """Least time of a chunk.

    Attributes:
        flop: arithmetic of all recomputed blocks, the encoder, entries and exits.
        unique_bytes: weights that are used, each once.
        kernels: operators run, 0 on a CPU.
        milliseconds: max(flop / peak, bytes / bandwidth).
        with_launches: that and 1.25 us for each kernel.
    """

    flop: float
    unique_bytes: float
    kernels: int
    milliseconds: float
    with_launches: float


def measure_machine(device: torch.device, repeats: int = 5) -> Machine:
    """Best of a few large matrix products and of a few sums over more memory than any cache holds."""
    # A GPU reaches its limits, and hides the launch, in large work only.
    size, numbers = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    memory = torch.ones(numbers, device=device)

    def best(work: object) -> float:
        seconds = []
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            work()  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return Machine(2 * size**3 / best(lambda: a @ b), memory.nbytes / best(memory.sum))


def floor_of(sampler: Sampler, machine: Machine) -> Floor:
    """What a sampler computes over what the machine can do, in float32 whatever its dtype."""
    policy, rows = sampler.policy, sampler.batch_size
    plain = replace(sampler.sampling, dtype="float32")
    engine = build_engine(policy, plain, rows, sampler.schedule)
    observation = random_observations(policy, rows, torch.Generator().manual_seed(0))
    noise = policy.noise(rows, None, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        engine(observation, noise)
    flop = float(counter.get_total_flops())
    # Every block is computed at the first evaluation.
    unique = float(sum(p.nbytes for p in policy.network.parameters()))
    seconds = max(flop / machine.flops, unique / machine.bandwidth)
    kernels = 0
    if policy.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            engine(observation, noise)
            torch.cuda.synchronize(policy.device)
        kernels = sum(event.count for event in profile.key_averages())
    return Floor(flop, unique, kernels, 1e3 * seconds, 1e3 * (seconds + kernels * LAUNCH_SECONDS))
