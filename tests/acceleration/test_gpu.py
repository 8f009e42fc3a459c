"""Captured and compiled samplers on a GPU: parity with eager, with and without reuse."""

import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey
from flowpolicy.acceleration.caching.scheduling import uniform
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.flow.sampler_spec import SamplerSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
STEPS, ROWS = 12, 5
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}  # of a normalised action


@pytest.fixture(scope="module")
def gpu_policy():
    torch.backends.cuda.matmul.allow_tf32 = False
    return random_policy().to("cuda")


def schedule(policy, cached, solver="euler"):
    if not cached:
        return None
    key = ScheduleKey.of(policy, SamplerSpec(num_steps=STEPS, solver=solver))
    return Schedule(key, (uniform(key.num_evaluations, 4),) * len(key.blocks), "uniform")


def normalized(policy, chunk):
    return policy.action_normalizer.normalize(chunk)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("backend", "solver"), [
    ("compile", "euler"), ("cuda_graph", "euler"), ("cuda_graph", "ab3"), ("cuda_graph", "taylor"),
])  # fmt: skip
def test_backends_agree_with_eager(gpu_policy, backend, solver, cached, dtype):
    plan = schedule(gpu_policy, cached, solver)
    sampling = SamplerSpec(num_steps=STEPS, solver=solver, backend="eager")
    eager = build_sampler(gpu_policy, sampling, batch_size=ROWS, schedule=plan)
    fast = build_sampler(gpu_policy, sampling, batch_size=ROWS, schedule=plan, backend=backend, dtype=dtype)
    for seed in range(3):  # a captured graph must read each call's own inputs
        observations = {key: value.cuda() for key, value in random_observations(ROWS, seed).items()}
        noise = torch.randn(ROWS, 4, 2, generator=torch.Generator().manual_seed(seed)).cuda()
        difference = normalized(gpu_policy, fast(observations, noise)) - normalized(
            gpu_policy, eager(observations, noise)
        )
        assert difference.abs().max() < TOLERANCE[dtype]


def test_a_captured_call_leaves_earlier_chunks_alone(gpu_policy):
    sampler = build_sampler(gpu_policy, batch_size=ROWS, num_steps=4, backend="cuda_graph")
    observations = {key: value.cuda() for key, value in random_observations(ROWS).items()}
    first = sampler(observations, torch.zeros(ROWS, 4, 2).cuda())
    before = first.clone()
    sampler(observations, torch.ones(ROWS, 4, 2).cuda())
    assert torch.equal(first, before)


def test_a_captured_call_allocates_only_the_chunk_it_returns(gpu_policy):
    sampler = build_sampler(gpu_policy, batch_size=ROWS, num_steps=4, backend="cuda_graph")
    observations = {key: value.cuda() for key, value in random_observations(ROWS).items()}
    noise = torch.zeros(ROWS, 4, 2).cuda()
    sampler(observations, noise)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sampler(observations, noise)
    assert torch.cuda.max_memory_allocated() - before < 2**20
