"""The loop of a sampler, on a frozen copy of the network: whole evaluations, or block by block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from flowpolicy.acceleration.caching.program import Recompute, program_of
from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.errors import ConfigError
from flowpolicy.flow.guidance import GuidedChunk, Transform, build_guidance, refuse_options
from flowpolicy.flow.network import Context
from flowpolicy.flow.objective import evaluations
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.blocks import AddressableBlocks, KeyValue, Modulation
from flowpolicy.policy import FlowPolicy
from flowpolicy.settings import choose

RunBlock = Callable[[Tensor, Modulation, KeyValue], Tensor]
Observe = Callable[[int, int, Tensor], None]
Evaluate = Callable[[int, Tensor], Tensor]  # the velocity (B, T, A) of an evaluation's number and x
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}
"""What the network computes in; weights of int8 are quantised by the backend that has it."""


class Engine:
    """From checked observations and x_0 to a chunk of commands, both in physical units, evaluation by
    evaluation.

    It computes what ``policy.act`` computes, with the same modules in the same order. x itself and the solver
    stay float32.

    Args:
        policy: its network is copied.
        sampling: K, solver, grid, dtype and guidance.
        batch_size: rows computed at once.
    """

    def __init__(self, policy: FlowPolicy, sampling: SamplerSpec, batch_size: int) -> None:
        self.policy, self.sampling, self.batch_size = policy, sampling, batch_size
        self.dtype = choose(DTYPES, sampling.dtype, "dtype")
        self.evaluations = evaluations(policy.objective, sampling)
        self.network = copy.deepcopy(policy.network).to(self.dtype).eval().requires_grad_(False)
        self.normalize = {key: part.frozen() for key, part in policy.observation_normalizers.items()}
        self.guidance = build_guidance(sampling.guidance)
        if self.guidance is not None:
            policy.objective.require_flow()
            self.guidance.check(str(sampling.solver))
        self.velocity = self.network.velocity
        self.times = [
            tuple(torch.full((1,), number, device=policy.device) for number in pair)
            for pair in self.evaluations
        ]

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor, **options: object) -> Tensor:
        """The chunk ``(B, T, A)`` from key -> ``(B, T_o, *shape)`` and x_0 ``(B, T, A)``; ``options`` are the
        guidance's."""
        refuse_options(self.guidance, options)
        if self.guidance is None:
            actions = self.policy.finish(self.integrate(self.encode(observation), noise))
            return self.policy.decode(actions, observation)
        # Gradients are needed even where the caller has switched them off, inference mode included.
        with torch.inference_mode(False), torch.no_grad():
            start = noise.clone()
            given = {key: value.clone() for key, value in observation.items()}
            context, policy = self.encode(given), self.policy

            def physical(x: Tensor) -> Tensor:
                return policy.decode(policy.action_normalizer.denormalize(x), given)

            def finish(x: Tensor) -> Tensor:
                return policy.decode(policy.finish(x), given)

            chunk = GuidedChunk(start, lambda a: policy.encode(a, given), physical, finish, options, given)
            return finish(self.guidance.sample(lambda wrap: self.integrate(context, start, wrap), chunk))

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Tensor]) -> Context:
        """What is computed once for an observation."""
        normalized = dict(observation)  # images as they are: the encoder converts them, once they are cropped
        for key, normalize in self.normalize.items():
            normalized[key] = normalize(observation[key])
        for key, values in normalized.items():
            if values.is_floating_point():
                normalized[key] = values.to(self.dtype)
        return self.network.encode(normalized)

    def integrate(self, context: Context, noise: Tensor, transform: Transform | None = None) -> Tensor:
        """The normalised chunk for an encoded observation, its velocity field transformed."""
        evaluate, numbers = self.evaluator(context), iter(range(len(self.evaluations)))

        def velocity(x: Tensor, t: float, h: float) -> Tensor:
            return evaluate(next(numbers), x)

        if transform is None:
            return self.policy.objective.sample(velocity, noise, self.sampling)
        places = {place: number for number, place in enumerate(self.evaluations)}

        def anywhere(x: Tensor, t: float, h: float) -> Tensor:
            """What a transform is given: it may look at other times, and more than once."""
            place = (t, self.policy.objective.step_size(h))
            if place in places:
                return evaluate(places[place], x)
            at, d = (x.new_full((1,), number, dtype=self.dtype) for number in place)
            return self.network.velocity(x.to(self.dtype), at, d, context).float()

        return self.policy.objective.sample(transform(anywhere), noise, self.sampling)

    def evaluator(self, context: Context) -> Evaluate:
        """How the evaluations of one chunk are computed."""

        def evaluate(evaluation: int, x: Tensor) -> Tensor:
            t, d = self.times[evaluation]
            return self.velocity(x.to(self.dtype), t.to(self.dtype), d.to(self.dtype), context).float()

        return evaluate


class SteeredEngine(Engine):
    """An engine for a policy with a steering, which it computes whole, as ``policy.act`` does."""

    def __init__(self, policy: FlowPolicy, sampling: SamplerSpec, batch_size: int) -> None:
        super().__init__(policy, sampling, batch_size)
        self.frozen = copy.deepcopy(policy).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor, **options: object) -> Tensor:
        """See :class:`Engine`."""
        policy = self.frozen
        chunk = policy.sample(policy.normalize(observation), noise, self.sampling)
        return policy.decode(policy.finish(chunk), observation)


class BlockEngine(Engine):
    """An engine for a network of addressable blocks: tabulated modulations, and a cache schedule's program.

    Under a schedule that recomputes everything the result is that of ``policy.act`` to the last bit. Only
    what does not change between calls is taken out of them.

    Args:
        policy: its network has :class:`~flowpolicy.models.blocks.AddressableBlocks`.
        sampling: K, solver, grid, dtype and guidance.
        batch_size: rows computed at once.
        schedule: which blocks are recomputed when; None recomputes everything.
    """

    def __init__(
        self, policy: FlowPolicy, sampling: SamplerSpec, batch_size: int, schedule: Schedule | None
    ) -> None:
        super().__init__(policy, sampling, batch_size)
        if self.guidance is not None and schedule is not None:
            raise ConfigError("Guidance needs every evaluation whole; leave out schedule=, or guidance=.")
        self.schedule = schedule
        network, own = cast("AddressableBlocks", self.network), cast("AddressableBlocks", policy.network)
        with torch.no_grad():  # one by one: a batch of them may round differently
            table = [own.modulations(t, d) for t, d in self.times]
        self.modulations = [Modulation.of_blocks(blocks.to(self.dtype), 3) for blocks, _ in table]
        self.last = [last.to(self.dtype) for _, last in table]
        self.blocks = list(network.blocks())
        every = (range(len(self.evaluations)),) * len(self.blocks)
        self.program = program_of(every if schedule is None else schedule.updates, len(self.evaluations))
        self.layers = [block.layer for block in self.blocks]
        self.run: list[RunBlock] = [block.module.forward for block in self.blocks]
        self.embed, self.readout = network.embed, network.readout
        self.observe: Observe | None = None

    def evaluator(self, context: Context) -> Evaluate:
        """Kept outputs of blocks, and sums of neighbouring ones, live as long as a chunk."""
        outputs: dict[int, Tensor] = {}
        sums: dict[tuple[int, ...], Tensor] = {}

        def evaluate(evaluation: int, x: Tensor) -> Tensor:
            h = self.embed(x.to(self.dtype))
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
            return self.readout(h, self.last[evaluation]).float()

        return evaluate


def random_observations(policy: FlowPolicy, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Observations over the range that the policy was trained on, for warming up and checking."""
    observation = {}
    for key, feature in policy.spec.features.items():
        values = feature.random((rows, policy.spec.obs_horizon), generator).to(policy.device)
        if key in policy.observation_normalizers:
            values = policy.observation_normalizers[key].denormalize(values)
        observation[key] = values
    return observation
