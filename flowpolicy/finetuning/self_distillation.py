"""Self-distillation: a policy that is tuned for one K is trained for the others."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowpolicy.data.sampling import Batch
from flowpolicy.finetuning.config import SelfDistillationConfig
from flowpolicy.policy import FlowPolicy
from flowpolicy.pretraining.ema import EMA
from flowpolicy.runs.progress import progress


def self_distill(
    tuned: FlowPolicy, observations: Mapping[str, Tensor], config: SelfDistillationConfig, *, seed: int
) -> FlowPolicy:
    """Train the policy with its own objective on the chunks that it samples with its tuned K.

    Fine-tuning moves the velocity at the K times (and the one step size) that the chain visits, and leaves
    the others behind. Here the tuned flow is the teacher: at observations from its rollouts it samples chunks
    from fresh noise, and a copy learns them by the objective that the policy was pretrained with, at all
    times and step sizes.

    Args:
        tuned: marked with the K it was tuned for.
        observations: normalised, key -> ``(N, T_o, *shape)``.
        config: settings.
        seed: of noise and batches.

    Returns:
        A policy for any K that its objective has, without steering: what that chose the copy has learnt.
    """
    device = tuned.device
    student = FlowPolicy(dataclasses.replace(tuned.config, tuned=None, steering=None)).to(device)
    student.load_state_dict({name: tuned.state_dict()[name] for name in student.state_dict()})
    teacher = copy.deepcopy(tuned).eval().requires_grad_(False)
    average = EMA(student.network, config.ema_decay)
    optimizer = torch.optim.Adam(student.network.parameters(), lr=config.learning_rate)
    generator = torch.Generator(device).manual_seed(seed)
    count = len(next(iter(observations.values())))
    shape = (config.batch_size, *student.spec.noise_shape)
    student.network.eval()  # no dropout: the target is a function
    for step in progress(config.steps, "distil"):
        index = torch.randint(count, (config.batch_size,), generator=generator, device=device)
        observed = {key: value[index] for key, value in observations.items()}
        noise = torch.randn((config.batch_size, *tuned.spec.noise_shape), generator=generator, device=device)
        with torch.no_grad():
            chunk = teacher.sample(observed, noise, tuned.sampling)
        batch = Batch(observed, chunk, torch.ones(shape[:2], dtype=torch.bool, device=device))
        draws = student.objective.draw(shape, generator, device)
        loss, _ = student.objective.loss(student.network, batch, draws, average.network)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.network.parameters(), 1.0)
        optimizer.step()
        average.update(step)
    student.network.load_state_dict(average.network.state_dict())
    return student.eval()
