"""Numbers that a reader is told."""

import pytest

from flowpolicy.rounding import three_digits


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.52, "0.52"), (-0.003, "-0.003"), (12.34, "12.3"), (99.96, "100"),
        (1382.6, "1383"), (1.2e-5, "1.2e-05"), (5e8, "5e+08"), (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)  # fmt: skip
def test_three_digits_count(value, text):
    assert three_digits(value) == text
