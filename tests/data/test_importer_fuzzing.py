"""Damaged files of every format are answered in one sentence, or imported with sane values."""

from __future__ import annotations

from pathlib import Path

import pytest

for module in ("zarr", "h5py", "pyarrow"):
    pytest.importorskip(module)
from importer_fuzzing import attempt, write_samples  # noqa: E402

from flowpolicy.data.importers import FORMATS  # noqa: E402


def test_mutated_files_of_every_format(tmp_path: Path):
    samples = write_samples(tmp_path)
    outcomes = [attempt(samples, seed) for seed in range(1000, 1000 + 40)]
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert {outcome.format for outcome in outcomes} == set(samples) > set(FORMATS)
    assert sum(outcome.answer != "imported" for outcome in outcomes) > len(outcomes) // 5
