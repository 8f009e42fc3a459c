import math

import pytest
import torch
from exact_fields import Field, sample

from flowpolicy.errors import ConfigError
from flowpolicy.flow import FlowMatching, Shortcut
from flowpolicy.flow.grids import Uniform
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import SOLVERS, integrate


def error(name, num_steps):
    """Of x(1) for dx/dt = x cos t, x(0) = 1, whose solution is exp(sin t)."""
    start = torch.ones(1, dtype=torch.float64)
    end = integrate(lambda x, t, h: x * math.cos(t), start, num_steps, SOLVERS[name], Uniform())
    return abs(float(end) - math.exp(math.sin(1.0)))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_measured_order_of_convergence(name, order):
    measured = [math.log2(error(name, steps) / error(name, 2 * steps)) for steps in (64, 128, 256)]
    assert all(abs(value - order) < 0.06 for value in measured)


@pytest.mark.parametrize("name", SOLVERS)
def test_stated_nfe_is_the_number_of_evaluations(name):
    field = Field(lambda x, t, d: -x)
    for objective, num_steps in ((FlowMatching(), 5), (Shortcut(max_steps=4), 4)):
        field.calls.clear()
        sample(objective, field, torch.ones(2, 1, 1), num_steps, name)
        stated = objective.nfe(SamplerSpec(num_steps=num_steps, solver=name))
        assert len(field.calls) == stated == SOLVERS[name].nfe(num_steps)


def test_euler_evaluates_left_end_points():
    field = Field(lambda x, t, d: torch.ones_like(x))
    sample(FlowMatching(), field, torch.zeros(1, 1, 1), 2, "euler")
    assert [float(t) for t, _ in field.calls] == [0.0, 0.5]
    field.calls.clear()
    sample(Shortcut(max_steps=8), field, torch.zeros(1, 1, 1), 4, "euler")
    assert [float(t) for t, _ in field.calls] == [0.0, 0.25, 0.5, 0.75]
    assert [float(d) for _, d in field.calls] == [0.25] * 4


def test_a_constant_field_is_integrated_exactly_by_all():
    start = torch.randn(3, 2, 2, dtype=torch.float64)
    for solver in SOLVERS.values():
        for steps in (1, 2, 8):
            end = integrate(lambda x, t, h: torch.full_like(x, 0.5), start, steps, solver, Uniform())
            assert torch.allclose(end, start + 0.5, atol=1e-12)


def test_unknown_solver_and_no_steps_are_refused():
    with pytest.raises(ConfigError, match="euler"):
        FlowMatching().check(SamplerSpec(num_steps=4, solver="eular"))
    with pytest.raises(ConfigError, match="at least 1"):
        FlowMatching().check(SamplerSpec(num_steps=0, solver="euler"))
