"""The inspection counts right, also where the store is broken, and its pictures appear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowpolicy.data.store import Demonstrations, write_demonstrations

zarr = pytest.importorskip("zarr")
from flowpolicy.data.inspection import inspect_demonstrations, metrics, summarise, table  # noqa: E402
from flowpolicy.plots.demonstrations import draw_contact_sheet, draw_histograms  # noqa: E402


def test_summary_agrees_with_numpy(monkeypatch):
    monkeypatch.setattr("flowpolicy.data.inspection._BLOCK_BYTES", 200)  # several blocks
    array = np.random.default_rng(0).normal(1e4, 1e-2, size=(57, 4))
    array[:, 2] = 7.0
    summary = summarise("x", array)
    assert (summary.low, summary.high) == (array.min(), array.max())
    np.testing.assert_allclose([summary.mean, summary.std], [array.mean(), array.std()], rtol=1e-12)
    assert summary.constant == (2,)
    array[3, 0], array[4:6, 1] = np.inf, np.nan
    broken = summarise("x", array)
    assert (broken.nans, broken.infinite) == (2, 1)
    assert broken.mean == pytest.approx(array[np.isfinite(array)].mean(), rel=1e-12)


def test_sound_store(tmp_path: Path, demos: Demonstrations):
    inspection = inspect_demonstrations(write_demonstrations(tmp_path / "a.zarr", demos))
    assert inspection.problem is None
    assert list(inspection.lengths) == [7, 12, 5, 9]
    np.testing.assert_allclose(inspection.returns, demos.episode_returns)
    text = table(inspection)
    for part in ("min 5, median 8, max 12", "observation", "2x2", "Sound: ready for training."):
        assert part in text
    assert "comes back from normalisation: 1 under minmax, 1 under gaussian, 1 under quantile" in text
    assert metrics(inspection)["lost_actions"] == {"minmax": 0.0, "gaussian": 0.0, "quantile": 0.0}


def test_numbers_that_float32_cannot_tell_apart_are_named(tmp_path: Path, demos: Demonstrations):
    demos.arrays["utm"] = 5e6 + np.linspace(-1, 1, demos.num_steps)[:, None]
    inspection = inspect_demonstrations(write_demonstrations(tmp_path / "a.zarr", demos))
    assert metrics(inspection)["collapsing"] == ["utm"]
    assert "not on utm: float32 cannot tell those numbers apart" in table(inspection)


def test_broken_store_is_described_rather_than_refused(tmp_path: Path, demos: Demonstrations):
    path = write_demonstrations(tmp_path / "a.zarr", demos)
    group = zarr.open_group(str(path), mode="a")
    group["data/observation"][4, 1] = np.nan
    inspection = inspect_demonstrations(path)
    assert {key.key: key.nans for key in inspection.keys}["observation"] == 1
    assert "'observation' is not finite at step 4" in inspection.problem
    assert "REFUSED" in table(inspection)
    assert metrics(inspection)["nans"] == 1
    broken = replace(inspection, arrays={"observation": inspection.arrays["observation"]})
    assert draw_histograms(broken, tmp_path)
    group["meta/episode_ends"][3] = 99
    assert inspect_demonstrations(path).lengths is None


@pytest.mark.parametrize("kind", ["image", "plane", "heat map"])
def test_pictures(tmp_path: Path, demos: Demonstrations, kind: str):
    from matplotlib.image import imread

    demos = Demonstrations(
        {key: demos.arrays[key][:12] for key in ("observation", "action")}, np.array([7, 12])
    )
    if kind == "image":
        rng = np.random.default_rng(0)
        demos.arrays["image"] = rng.integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    if kind == "heat map":
        demos.arrays["action"] = np.repeat(demos.arrays["action"], 3, axis=1)
    inspection = inspect_demonstrations(write_demonstrations(tmp_path / "a.zarr", demos))
    if kind == "image":
        histograms = draw_histograms(inspection, tmp_path / "run")
        assert {path.name for path in histograms} == {"histogram_action.png", "histogram_observation.png"}
    sheet = draw_contact_sheet(inspection, tmp_path / "run" / "sheet.png")
    assert imread(sheet)[..., :3].std() > 0.05  # not an empty page
