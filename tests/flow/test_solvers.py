import itertools
import math

import pytest
import torch
from exact_fields import Field, sample

from flowpolicy.errors import ConfigError
from flowpolicy.flow import FlowMatching, Shortcut
from flowpolicy.flow.grids import Given, Shifted, Sigmoid, Uniform
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.flow.solvers import SOLVERS, build_solver, integrate


def error(name, grid, num_steps):
    """Of x(1) for dx/dt = x cos t, x(0) = 1, whose solution is exp(sin t)."""
    end = integrate(lambda x, t, h: x * math.cos(t), 1.0, num_steps, build_solver(name), grid)
    return abs(end - math.exp(math.sin(1.0)))


ORDERS = [("euler", 1), ("midpoint", 2), ("heun", 2), ("taylor", 2), ("ab2", 2), ("ab1", 1)]


@pytest.mark.parametrize("grid", [Uniform(), Shifted(0.5), Sigmoid(3.0)], ids=lambda grid: grid.name)
@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_measured_order_of_convergence(name, order, grid):
    errors = [error(name, grid, steps) for steps in (256, 512, 1024)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.06 for value in measured)


def growing_at_first(num_steps):
    """A first step of K^-2, then uneven ones: long and short in turn."""
    lengths = [num_steps**-2, *(1.0 + 0.5 * (k % 2) for k in range(1, num_steps))]
    scale = (1 - lengths[0]) / sum(lengths[1:])
    times = [0.0, *(lengths[0] + scale * part for part in itertools.accumulate(lengths[1:], initial=0.0))]
    return Given((*times[:-1], 1.0))


@pytest.mark.parametrize(("name", "order"), [("ab2", 2), ("ab3", 3), ("ab123", 3)])
def test_adams_bashforth_has_its_order_once_it_has_begun(name, order):
    """Euler's first step costs h^2, which a short one makes small enough."""
    errors = [error(name, growing_at_first(steps), steps) for steps in (32, 64, 128)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(value - order) < 0.15 for value in measured)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_adams_bashforth_is_exact_for_polynomials_below_its_order(order):
    grid = Given((0.0, 0.1, 0.15, 0.6, 1.0))
    moves, x = [], 0.0
    step = build_solver(f"ab{order}").start()
    for t, h in grid.steps(4):
        after = step(lambda x, t: order * t ** (order - 1), x, t, h)
        moves.append((after - x, (t + h) ** order - t**order))
        x = after
    assert all(found == pytest.approx(wanted) for found, wanted in moves[order - 1 :])


def test_orders_are_given_step_by_step():
    def end(name, steps=4):
        return error(name, Shifted(0.5), steps)

    assert end("ab1") == pytest.approx(end("euler"), rel=1e-12)
    assert end("ab123") == end("ab3") == end("ab3333")
    assert len({end(name) for name in ("ab1", "ab2", "ab3", "ab112", "ab1221")}) == 5
    with pytest.raises(ConfigError, match="at most 3 steps"):
        FlowMatching().check(SamplerSpec(num_steps=3, solver="ab1221"))


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


@pytest.mark.parametrize("name", ["eular", "ab", "ab4", "ab0", "ab2 ", "AB2"])
def test_unknown_solvers_are_refused(name):
    with pytest.raises(ConfigError, match=r"solver is '.*choose one of"):
        SamplerSpec(num_steps=4, solver=name)


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        FlowMatching().check(SamplerSpec(num_steps=0, solver="euler"))
