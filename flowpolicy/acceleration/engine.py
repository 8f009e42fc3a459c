"""The loop of a sampler: tabulated modulations and a schedule's program, on a frozen copy of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flowpolicy.acceleration.caching.program import Evaluation, Recompute, program_of
from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.models.blocks import KeyValue, Modulation, spread
from flowpolicy.models.transformer import Context
from flowpolicy.observations import is_image
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import choose

RunBlock = Callable[[Tensor, Modulation, KeyValue], Tensor]
Observe = Callable[[int, int, Tensor], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What a sampler is fixed to.

    Attributes:
        batch_size: rows computed at once.
        num_steps: K.
        solver: name of the ODE solver.
        schedule: which blocks are recomputed when.
        dtype: of the network: ``float32``, ``bfloat16``, or ``int8`` (weights, where the backend has it).
    """

    batch_size: int
    num_steps: int
    solver: str
    schedule: Schedule
    dtype: str = "float32"

    def program(self) -> tuple[Evaluation, ...]:
        """The operations of each network evaluation."""
        return program_of(self.schedule.updates, self.schedule.key.num_evaluations)


class Engine:
    """From checked observations and x_0 to a chunk, both in physical units, evaluation by evaluation.

    It computes what ``policy.act`` computes, with the same modules in the same order: under a program
    that recomputes everything the result is the same to the last bit. Only what does not change between
    calls is taken out of them.

    Args:
        policy: a flow-matching or shortcut policy; its network is copied.
        plan: K, solver, schedule and dtype. x itself and the solver stay float32.
    """

    def __init__(self, policy: FlowPolicy, plan: Plan) -> None:
        dtype = choose(DTYPES, plan.dtype, "dtype")
        self.plan, self.program, self.dtype = plan, plan.program(), dtype
        self.policy = policy
        level = torch.full((1,), policy.objective.level_of(plan.num_steps), device=policy.device)
        with torch.no_grad():  # one by one: a batch of them may round differently
            table = [
                policy.network.modulations(torch.full_like(level, t, dtype=torch.float32), level)
                for t in evaluation_times(plan.num_steps, plan.solver)
            ]
        self.modulations = [[_taken_apart(m.to(dtype)) for m in blocks.unbind(1)] for blocks, _ in table]
        self.last = [last.to(dtype) for _, last in table]
        self.network = copy.deepcopy(policy.network).to(dtype).eval().requires_grad_(False)
        blocks = list(self.network.blocks())
        self.layers = [block.layer for block in blocks]
        self.run: list[RunBlock] = [block.module.gated for block in blocks]
        self.enter, self.leave = self.network.enter, self.network.leave
        self.normalize = {key: part.frozen() for key, part in policy.observation_normalizers.items()}
        self.observe: Observe | None = None

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """The chunk ``(B, T, A)`` from key -> ``(B, T_o, *shape)`` and x_0 ``(B, T, A)``."""
        return self.policy.finish(self.integrate(self.encode(observation), noise))

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Tensor]) -> Context:
        """What is computed once for an observation: keys and values of every layer."""
        seen = dict(observation)  # images as they are: the encoder converts them, once they are cropped
        for key, normalize in self.normalize.items():
            seen[key] = normalize(observation[key]).to(self.dtype)
        context: Context = self.network.encode(seen)
        return context

    def integrate(self, context: Context, noise: Tensor) -> Tensor:
        """Solve the ODE for an encoded observation."""
        outputs: dict[int, Tensor] = {}
        sums: dict[tuple[int, ...], Tensor] = {}
        evaluations = iter(range(len(self.program)))

        def velocity(x: Tensor, t: float) -> Tensor:
            return self._evaluate(next(evaluations), x, context, outputs, sums)

        return integrate(velocity, noise, self.plan.num_steps, SOLVERS[self.plan.solver])

    def _evaluate(
        self, evaluation: int, x: Tensor, context: Context,
        outputs: dict[int, Tensor], sums: dict[tuple[int, ...], Tensor],
    ) -> Tensor:  # fmt: skip
        h = self.enter(x.to(self.dtype))
        modulations = self.modulations[evaluation]
        for operation in self.program[evaluation]:
            if isinstance(operation, Recompute):
                block = operation.block
                output = self.run[block](h, modulations[block], context[self.layers[block]])
                if operation.kept:
                    outputs[block] = output
                if self.observe is not None:
                    self.observe(evaluation, block, output)
                h = h + output
            else:
                if operation.fresh:
                    total = outputs[operation.blocks[0]]
                    for block in operation.blocks[1:]:
                        total = total + outputs[block]
                    sums[operation.blocks] = total
                h = h + sums[operation.blocks]
        return self.leave(h, self.last[evaluation]).float()


def _taken_apart(modulation: Tensor) -> Modulation:
    shift, scale, gate = spread(modulation, 3)
    return Modulation(shift, 1 + scale, gate)


def evaluation_times(num_steps: int, solver: str) -> list[float]:
    """Flow times of the network evaluations of one chunk, in their order."""
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    integrate(velocity, torch.zeros(1), num_steps, SOLVERS[solver])
    return times


def random_observations(policy: FlowPolicy, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Observations over the range that the policy was trained on, for warming up and checking."""
    observation = {}
    for key, shape in policy.observation_shapes.items():
        sizes = (rows, policy.obs_horizon, *shape)
        if is_image(shape):
            pixels = torch.randint(256, sizes, generator=generator, dtype=torch.uint8)
            observation[key] = pixels.to(policy.device)
            continue
        values = torch.rand(sizes, generator=generator) * 2 - 1
        observation[key] = policy.observation_normalizers[key].denormalize(values.to(policy.device))
    return observation
