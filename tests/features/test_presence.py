"""Observations that something may lack."""

import numpy as np
import pytest

from flowpolicy.features import Presence, Vector
from flowpolicy.features.presence import completed

FEATURES = {"x": Vector((2,)), "q": Vector((3,)), "q.present": Presence((), of="q")}


@pytest.mark.parametrize("given", [{}, {"q.present": np.zeros((4, 1), np.float32)}])
def test_what_is_missing_is_at_rest_and_told(given):
    found = completed(FEATURES, {"x": np.ones((4, 1, 2), np.float32), **given})
    assert found["q"].shape == (4, 1, 3)
    assert not found["q"].any()
    assert found["q.present"].shape == (4, 1)
    assert not found["q.present"].any()


def test_what_is_complete_stays_as_it_is():
    whole = {"x": np.ones((4, 1, 2)), "q": np.ones((4, 1, 3)), "q.present": np.ones((4, 1))}
    assert completed(FEATURES, whole) is whole
