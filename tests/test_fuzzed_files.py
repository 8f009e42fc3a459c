"""Damaged files of every kind are refused in one sentence, or what they describe works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("gymnasium", reason="gymnasium is not installed")
CASES, SEED = 200, 7


@pytest.fixture(scope="module")
def fuzz(repo_root: Path) -> Any:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        import fuzz_files
    finally:
        sys.path.pop(0)
    return fuzz_files


@pytest.fixture(scope="module")
def valid(fuzz: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    fuzz.write_all(folder)
    fuzz.use_valid(folder)
    return folder


@pytest.mark.parametrize("first", range(0, CASES, 50))
def test_a_damaged_file_is_refused_in_one_sentence_or_works(fuzz: Any, valid: Path, first: int):
    answers = [fuzz.run_case(valid, index, SEED) for index in range(first, first + 50)]
    bad = [answer for answer in answers if answer.outcome == "failed"]
    assert not bad, bad
    assert max(answer.cpu_seconds for answer in answers) < fuzz.LONGEST_S
    assert max(answer.grown_megabytes for answer in answers) < 250
    assert sum(answer.outcome == "refused" for answer in answers) > 25
