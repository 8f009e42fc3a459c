"""Solvers, guidance and networks from outside: every backend computes what the policy does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from toy_policy import random_observations, random_policy

from flowpolicy.acceleration.caching.schedule import ScheduleKey
from flowpolicy.acceleration.engine import BlockEngine
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import ConfigError
from flowpolicy.flow.grids import Shifted, Uniform
from flowpolicy.flow.guidance import GUIDANCES, Guidance
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.models.config import MLPConfig

BACKENDS = ["eager", "compile", "onnx"]


class AdamsBashforth:
    """Two steps, of any lengths; the first step is a midpoint step."""

    name = "adams_bashforth"

    def nfe(self, num_steps):
        return num_steps + 1

    def start(self):
        before = []

        def step(velocity, x, t, h):
            v = velocity(x, t)
            if before:
                last, length = before[0]
                share = h / (2 * length)
                end = x + h * (1 + share) * v + -h * share * last
            else:
                end = x + h * velocity(x + h / 2 * v, t + h / 2)
            before[:] = [(v, h)]
            return end

        return step


@pytest.fixture(autouse=True)
def solver(monkeypatch):
    monkeypatch.setitem(SOLVERS, AdamsBashforth.name, AdamsBashforth())


def normalized(policy, chunk):
    return policy.action_normalizer.normalize(chunk)


def assert_computes(policy, backend, observations, noise, exports, **settings):
    """The sampler gives the policy's own chunk, twice, and evaluates as often as it says."""
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    expected = policy.act(observations, sampler=SamplerSpec(**settings), noise=noise)
    sampler = build_sampler(policy, batch_size=5, backend=backend, exports=exports, **settings)
    for _ in range(2):
        found = sampler(observations, noise)
        torch.testing.assert_close(normalized(policy, found), normalized(policy, expected), rtol=0, atol=1e-4)
    return sampler


@pytest.mark.parametrize("grid", [Uniform(), Shifted(0.4)])
def test_a_multistep_solver_is_exact_where_the_flow_is_quadratic_in_time(grid):
    start = torch.randn(2, 3, 1, dtype=torch.float64)
    for num_steps in (1, 2, 5):
        end = integrate(lambda x, t, h: 0 * x + 3 * t - 1, start, num_steps, AdamsBashforth(), grid)
        torch.testing.assert_close(end, start + 0.5, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_steps", [3, 20])  # one graph for all, and one for each kind of evaluation
def test_a_multistep_solver_runs_in_every_backend(backend, num_steps, policy, observations, noise, exports):
    settings = {"num_steps": num_steps, "solver": AdamsBashforth.name}
    sampler = assert_computes(policy, backend, observations, noise, exports, **settings)
    assert sampler.nfe() == policy.nfe(num_steps, AdamsBashforth.name) == num_steps + 1
    euler = policy.act(observations, num_steps=num_steps, noise=noise)
    assert not torch.allclose(sampler(observations, noise), euler, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shifted_grid_runs_in_every_backend(backend, policy, observations, noise, exports):
    shifted = {"name": "shifted", "shift": 0.4}
    assert_computes(policy, backend, observations, noise, exports, num_steps=5, grid=shifted)
    with pytest.raises(ConfigError, match="built for num_steps=5"):
        build_sampler(policy, num_steps=5, grid=shifted).act(observations, num_steps=4)


def mlp_policy(objective="flow_matching"):
    return random_policy(objective, model=MLPConfig(width=16, depth=2, hidden=24))


@pytest.fixture(scope="module")
def mlp_exports():
    """What ONNX samplers of these policies have exported so far, by objective."""
    return {"flow_matching": {}, "shortcut": {}, "mip": {}}


@pytest.mark.parametrize(
    ("objective", "num_steps", "backend"),
    [
        # Compiled it is in test_vision.py, with cameras: one compilation for both.
        *(("flow_matching", num_steps, backend) for num_steps in (2, 20) for backend in ("eager", "onnx")),
        ("shortcut", 2, "eager"), ("mip", 2, "eager"), ("mip", 2, "onnx"),
    ],
)  # fmt: skip
def test_a_network_without_blocks_runs_in_every_backend(
    objective, num_steps, backend, observations, noise, mlp_exports
):
    exports = mlp_exports[objective]
    sampler = assert_computes(
        mlp_policy(objective), backend, observations, noise, exports, num_steps=num_steps
    )
    assert sampler.schedule is None


def test_a_network_without_blocks_is_not_cached():
    policy = mlp_policy()
    with pytest.raises(ConfigError, match=r"'mlp' has no addressable blocks.*model\.network=transformer"):
        ScheduleKey.of(policy, SamplerSpec(num_steps=8))
    assert not isinstance(build_sampler(policy).compute, BlockEngine)


@dataclass(frozen=True)
class Pull(Guidance):
    """Bends the field towards a goal in normalised units."""

    name: ClassVar[str] = "pull"
    options: ClassVar[tuple[str, ...]] = ("goal",)
    gain: float = 0.5

    def bend(self, velocity, chunk):
        goal = chunk.options.get("goal")
        return velocity if goal is None else lambda x, t, h: velocity(x, t, h) + self.gain * (goal - x)


@pytest.mark.parametrize("make", [random_policy, mlp_policy])
def test_guidance_from_outside_bends_the_field_that_is_integrated(monkeypatch, make, noise):
    monkeypatch.setitem(GUIDANCES, Pull.name, Pull)
    policy, observations = make(), random_observations(5)
    sampler = build_sampler(policy, num_steps=4, guidance={"name": "pull", "gain": 0.7})
    context = policy.network.encode(policy.normalize_observations(observations))
    goal, x = torch.full((5, 4, 2), 0.3), noise
    with torch.no_grad():
        for k in range(4):
            v = policy.network.velocity(x, torch.full((1,), k / 4), torch.zeros(1), context)
            x = x + (v + 0.7 * (goal - x)) / 4
    found = sampler.act(observations, noise=noise, goal=goal)
    torch.testing.assert_close(found, policy.finish(x), rtol=0, atol=1e-5)
    free = policy.act(observations, num_steps=4, noise=noise)
    assert torch.equal(sampler.act(observations, noise=noise), free)
    with pytest.raises(ConfigError, match="does not take prefix"):
        sampler.act(observations, noise=noise, prefix=(goal, torch.ones(5, 4)))
    with pytest.raises(ConfigError, match="backend is 'onnx'"):
        build_sampler(policy, backend="onnx", guidance={"name": "pull"})
    with pytest.raises(ConfigError, match="did you mean 'pull'"):
        build_sampler(policy, guidance={"name": "pul"})


@dataclass(frozen=True)
class Ahead(Guidance):
    """Averages the field here with the field half a step ahead."""

    name: ClassVar[str] = "ahead"

    def bend(self, velocity, chunk):
        def bent(x, t, h):
            v = velocity(x, t, h)
            return 0.5 * (v + velocity(x + h / 2 * v, t + h / 2, h))

        return bent


def test_guidance_may_look_at_the_field_elsewhere_and_more_than_once(monkeypatch, noise):
    monkeypatch.setitem(GUIDANCES, Ahead.name, Ahead)
    policy, observations = random_policy(), random_observations(5)
    found = build_sampler(policy, num_steps=3, guidance={"name": "ahead"})(observations, noise)
    context = policy.network.encode(policy.normalize_observations(observations))
    x = noise
    with torch.no_grad():
        for k in range(3):
            v, zero = (
                policy.network.velocity(x, torch.full((1,), k / 3), torch.zeros(1), context),
                torch.zeros(1),
            )
            later = policy.network.velocity(x + v / 6, torch.full((1,), (k + 0.5) / 3), zero, context)
            x = x + (v + later) / 6
    torch.testing.assert_close(found, policy.finish(x), rtol=0, atol=1e-5)


class Often:
    """Euler, six times in a step."""

    name = "often"

    def nfe(self, num_steps):
        return 6 * num_steps

    def start(self):
        def step(velocity, x, t, h):
            for part in range(6):
                x = x + h / 6 * velocity(x, t + part * h / 6)
            return x

        return step


def test_a_solver_may_take_any_number_of_evaluations_a_step(monkeypatch, noise):
    monkeypatch.setitem(SOLVERS, Often.name, Often())
    policy, observations = random_policy(), random_observations(5)
    sampler = build_sampler(policy, num_steps=2, solver="often")
    assert sampler.nfe() == 12
    torch.testing.assert_close(
        sampler(observations, noise), policy.act(observations, num_steps=12, noise=noise)
    )


def test_a_prefix_is_for_euler_steps():
    with pytest.raises(ConfigError, match="solver is 'heun'; it must be euler"):
        build_sampler(random_policy(), num_steps=4, solver="heun", guidance={"name": "prefix"})


def test_a_policy_by_itself_refuses_what_only_a_sampler_does(noise):
    policy = random_policy()
    with pytest.raises(ConfigError, match="build a sampler"):
        policy.act(random_observations(5), sampler=SamplerSpec(guidance={"name": "prefix"}), noise=noise)
