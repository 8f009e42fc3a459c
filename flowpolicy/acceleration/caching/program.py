"""A schedule as operations: blocks to recompute, and sums of kept outputs in place of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Recompute:
    """Run a block and add its output; ``kept`` where a later evaluation adds it again."""

    block: int
    kept: bool


@dataclass(frozen=True)
class Reuse:
    """Add the kept outputs of neighbouring ``blocks``; ``fresh`` where their sum has to be formed first."""

    blocks: tuple[int, ...]
    fresh: bool


Operation = Recompute | Reuse
Evaluation = tuple[Operation, ...]


def program_of(updates: Sequence[Sequence[int]], num_evaluations: int) -> tuple[Evaluation, ...]:
    """The operations of each network evaluation, in the order of computation.

    Neighbouring reused blocks become one addition. Their sum is formed when it is first wanted and stands
    until one of them is recomputed, so that an evaluation in which nothing is recomputed adds one tensor.
    """
    recomputed = [frozenset(steps) for steps in updates]
    last_use = [_last_uses(sorted(steps), num_evaluations) for steps in recomputed]
    sums: set[tuple[int, ...]] = set()
    program = []
    for evaluation in range(num_evaluations):
        operations: list[Operation] = []
        for is_reused, blocks in _runs([evaluation not in steps for steps in recomputed]):
            if is_reused:
                operations.append(Reuse(blocks, fresh=blocks not in sums))
                sums.add(blocks)
            else:
                operations += [Recompute(b, kept=last_use[b][evaluation]) for b in blocks]
        changed = {block for block, steps in enumerate(recomputed) if evaluation in steps}
        sums = {blocks for blocks in sums if not changed.intersection(blocks)}
        program.append(tuple(operations))
    return tuple(program)


def _last_uses(steps: list[int], num_evaluations: int) -> dict[int, bool]:
    """Whether the output of each update is used again before the next one."""
    following = [*steps[1:], num_evaluations]
    return {step: after > step + 1 for step, after in zip(steps, following, strict=True)}


def _runs(flags: list[bool]) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Maximal runs of equal flags, with the indices in them."""
    start = 0
    for index in range(1, len(flags) + 1):
        if index == len(flags) or flags[index] != flags[start]:
            yield flags[start], tuple(range(start, index))
            start = index
