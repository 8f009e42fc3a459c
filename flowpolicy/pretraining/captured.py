"""The loss and its gradients as one CUDA graph, which spares a GPU a thousand launches of small kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flowpolicy.data.sampling import Batch
from flowpolicy.flow.objective import Draws, Metrics

Backward = Callable[[Batch, Draws], Metrics]
WARM_UP = 3  # calls before the capture, in which libraries choose their kernels


class CapturedBackward:
    """Captures a loss and its backward pass for batches of one size, and replays them.

    A call overwrites the gradients of the call before. The networks may change between calls, in place;
    random numbers (dropout) follow torch's global seed as they do without a graph.

    Args:
        backward: computes the loss of a batch, leaves the gradients in the parameters, and returns metrics.
        batch: of the size and the device of all that will come.
        draws: of its loss.

    Raises:
        RuntimeError: something in it cannot be captured.
    """

    def __init__(self, backward: Backward, batch: Batch, draws: Draws) -> None:
        self.batch = Batch(
            {key: value.clone() for key, value in batch.observation.items()},
            batch.action.clone(),
            batch.mask.clone(),
            reward=None if batch.reward is None else batch.reward.clone(),
        )
        self.draws = Draws(draws.noise.clone(), draws.t.clone(), draws.d.clone())
        with torch.cuda.device(batch.action.device):  # of several, not always the current one
            self._capture(backward)

    def _capture(self, backward: Backward) -> None:
        drawn, drawn_there = torch.get_rng_state(), torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    backward(self.batch, self.draws)
            torch.cuda.current_stream().wait_stream(stream)
            if not torch.equal(torch.get_rng_state(), drawn):
                raise RuntimeError("the loss draws random numbers on the CPU, which a graph would repeat")
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.metrics = backward(self.batch, self.draws)
        finally:  # the first step draws as all others do, captured or not
            torch.set_rng_state(drawn)
            torch.cuda.set_rng_state(drawn_there)

    def __call__(self, batch: Batch, draws: Draws) -> Metrics:
        """The metrics of another batch; its gradients are in the parameters."""
        given = zip(_tensors(self.batch, self.draws), _tensors(batch, draws), strict=True)
        for own, new in given:
            own.copy_(new)
        with torch.cuda.device(self.batch.action.device):
            self.graph.replay()
        return {name: value.clone() for name, value in self.metrics.items()}


def _tensors(batch: Batch, draws: Draws) -> Iterator[Tensor]:
    yield from (batch.observation[key] for key in sorted(batch.observation))
    yield from (batch.action, batch.mask, draws.noise, draws.t, draws.d)
    if batch.reward is not None:
        yield batch.reward
