"""What is left to do under a schedule, against a simulation of it with one number a block."""

import numpy as np
import pytest

from flowpolicy.acceleration.caching.program import Recompute, Reuse, program_of


@pytest.mark.parametrize("seed", range(20))
def test_a_program_adds_every_block_once_and_never_something_stale(seed):
    rng = np.random.default_rng(seed)
    blocks, size = int(rng.integers(1, 7)), int(rng.integers(1, 12))
    updates = [(0, *np.flatnonzero(rng.random(size - 1) < 0.3) + 1) for _ in range(blocks)]
    kept, sums = {}, {}
    for e, operations in enumerate(program_of(updates, size)):
        added = []
        for operation in operations:
            if isinstance(operation, Recompute):
                assert e in updates[operation.block]
                if operation.kept:
                    kept[operation.block] = (operation.block, e)
                added.append((operation.block, e))
            else:
                if operation.fresh:
                    sums[operation.blocks] = [kept[block] for block in operation.blocks]
                added += sums[operation.blocks]
        # Each block in its order, and from the last evaluation at which it was to be recomputed.
        assert added == [(b, max(u for u in updates[b] if u <= e)) for b in range(blocks)]


def test_an_evaluation_without_updates_adds_one_tensor():
    program = program_of([(0, 3), (0,), (0, 3)], 5)
    assert program[0] == (Recompute(0, True), Recompute(1, True), Recompute(2, True))
    assert program[1] == (Reuse((0, 1, 2), fresh=True),)
    assert program[2] == (Reuse((0, 1, 2), fresh=False),)
    assert program[3] == (Recompute(0, True), Reuse((1,), fresh=True), Recompute(2, True))
    assert program[4] == (Reuse((0, 1, 2), fresh=True),)


def test_what_is_not_used_again_is_not_kept():
    program = program_of([(0, 1, 2), (0, 2)], 3)
    kept = [[op.kept for op in operations if isinstance(op, Recompute)] for operations in program]
    assert kept == [[False, True], [False], [False, False]]
