"""Histories of several slots are what each slot would keep by itself."""

import numpy as np
import pytest

from flowpolicy.errors import FlowPolicyError
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.features import Depth, Image, Vector


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_each_slot_keeps_its_last_observations_and_the_first_fills_it(horizon):
    rng = np.random.default_rng(0)
    buffer = HistoryBuffer({"pose": ((3,), np.float32), "image": ((2, 2, 1), np.uint8)}, 4, horizon)
    by_hand: dict[int, list] = {}
    for _ in range(40):
        slots = np.flatnonzero(rng.random(4) < 0.7)
        for slot in np.flatnonzero(rng.random(4) < 0.2):
            buffer.restart(slot)
            by_hand.pop(slot, None)
        pose = rng.normal(size=(len(slots), 3)).astype(np.float32)
        image = rng.integers(0, 255, (len(slots), 2, 2, 1)).astype(np.uint8)
        buffer.add({"pose": pose, "image": image, "other": pose}, slice(None) if len(slots) == 4 else slots)
        for slot, *row in zip(slots, pose, image, strict=True):
            by_hand[slot] = [*by_hand.get(slot, [row] * horizon), row][-horizon:]
        kept = buffer.copy()
        for slot, rows in by_hand.items():
            np.testing.assert_array_equal(kept["pose"][slot], [row[0] for row in rows])
            np.testing.assert_array_equal(kept["image"][slot], [row[1] for row in rows])


def test_a_tape_goes_on_as_single_observations_do():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 5, 2))
    single = HistoryBuffer({"x": ((2,), np.float64)}, 3, 2)
    single.add({"x": rows[:, 0]})
    taped = HistoryBuffer.of(single.arrays)
    tape, steps = taped.tape(4), np.array([0, 2, 4])
    tape["x"][:, 2:] = rows[:, 1:]
    taped.wind(tape, steps)
    for at in range(1, 5):
        slots = np.flatnonzero(steps >= at)
        single.add({"x": rows[slots, at]}, slots)
    np.testing.assert_array_equal(taped.arrays["x"], single.arrays["x"])
    copy = taped.copy()
    copy["x"][:] = 9
    assert (taped.arrays["x"] != 9).all()


def test_a_missing_key_is_named():
    buffer = HistoryBuffer({"pose": ((1,), np.float32)}, 1, 1)
    with pytest.raises(FlowPolicyError, match="needs the observation 'pose' and got image"):
        buffer.add({"image": np.zeros((1, 1))})


def test_a_policys_buffer_brings_each_kind_into_its_form():
    buffer = HistoryBuffer.of_features({"pose": Vector((1,)), "depth": Depth((8, 8))}, 1, 2)
    buffer.add({"pose": np.ones((1, 1), int), "depth": np.full((1, 8, 8), 1500, np.uint16)})
    assert buffer.arrays["pose"].ravel().tolist() == [1, 1]
    np.testing.assert_allclose(buffer.arrays["depth"], 1.5)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_an_image_of_another_type_is_refused_and_nothing_is_lost(dtype):
    buffer = HistoryBuffer.of_features({"pose": Vector((1,)), "image": Image((8, 8, 3))}, 1, 2)
    image = np.full((1, 8, 8, 3), 9, np.uint8)
    buffer.add({"pose": np.zeros((1, 1)), "image": image})
    with pytest.raises(FlowPolicyError, match=r"'image' is an image of .*; give uint8"):
        buffer.add({"pose": np.ones((1, 1)), "image": image.astype(dtype)})
    assert not buffer.arrays["pose"].any()
    assert (buffer.arrays["image"] == 9).all()
