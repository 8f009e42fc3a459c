"""Seeds of neighbouring runs lead to nothing in common."""

import numpy as np
import pytest

from flowpolicy.runs.seeds import FIRST_DERIVED, derived_seed


def test_runs_purposes_and_numbers_have_seeds_far_apart_and_beyond_those_that_people_type():
    seeds = [
        derived_seed(seed, *purpose)
        for seed in range(20)
        for purpose in ((), ("environments",), ("restart", 0), ("restart", 1), ("restart", 0, 1), (0, 1))
    ]
    assert np.diff(np.sort(seeds)).min() > 1000
    assert FIRST_DERIVED <= min(seeds) < max(seeds) < 2**31
    assert derived_seed(3, "chains", 1) == derived_seed(3, "chains", 1)
    with pytest.raises(ValueError, match=r"non-negative|negative"):
        derived_seed(-1)
