import math

import numpy as np
import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.sweep import format_table
from flowpolicy.plots.evaluation import plot_k_sweep, plot_returns
from flowpolicy.plots.learning import plot_finetuning_bands, plot_learning_curves

pytest.importorskip("matplotlib")


def training_rows() -> list[dict[str, float]]:
    rows = []
    for step in range(50, 5001, 50):
        row = {"step": float(step), "loss/total": 1.2 * math.exp(-step / 1500) + 0.15 + 0.02 * math.sin(step)}
        if step % 500 == 0:
            row["validation/loss"] = 1.2 * math.exp(-step / 1500) + 0.2
            row["validation/action_error"] = 0.5 * math.exp(-step / 2000) + 0.1
        if step % 1000 == 0:
            mean = 1400 * (1 - math.exp(-step / 1200))
            row |= {"evaluation/return": mean, "evaluation/return_low": mean - 120}
            row |= {"evaluation/return_high": mean + 130, "evaluation/episodes": 20.0}
        rows.append(row)
    return rows


def sweep_rows() -> list[dict[str, object]]:
    return [
        {
            "num_steps": steps,
            "nfe": steps,
            "ms_per_chunk": 1.1 * steps + 0.4,
            "return_mean": 1400 - 500 / steps,
            "return_ci95": [1330 - 500 / steps, 1480 - 500 / steps],
            "success_rate": None,
            "success_ci95": None,
            "score_mean": None,
            "score_ci95": None,
            "episodes": 100,
        }
        for steps in (16, 1, 2, 4)
    ]


def _is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_each_figure_is_written_whole(tmp_path):
    generator = np.random.default_rng(0)
    paths = [
        plot_learning_curves(
            training_rows(), tmp_path / "curves.png", title="hopper, shortcut", demo_mean=1450
        ),
        plot_k_sweep(sweep_rows(), tmp_path / "sweep.png", title="hopper, shortcut", demo_mean=1450),
        plot_returns(
            generator.normal(1400, 150, 100),
            tmp_path / "returns.png",
            demo_returns=generator.normal(1450, 250, 80),
            interval=(1370, 1430),
        ),
    ]
    assert all(_is_png(path) for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)


def test_sparse_and_degenerate_input_still_draws(tmp_path):
    assert _is_png(plot_learning_curves([{"step": 1, "loss/total": 0.5}], tmp_path / "a.png"))
    assert _is_png(plot_returns([7.0], tmp_path / "b.png", demo_mean=7.0, interval=(math.nan, math.nan)))
    assert _is_png(plot_returns([0.0, 0.0], tmp_path / "c.png"))
    row = {**sweep_rows()[0], "return_ci95": [math.nan, math.nan], "episodes": 1}
    assert _is_png(plot_k_sweep([row], tmp_path / "d.png"))
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_learning_curves([{"step": 1.0}], tmp_path / "e.png")
    assert not (tmp_path / "e.png").exists()


def test_the_table_has_only_the_columns_that_the_task_has():
    text = format_table(sweep_rows())
    assert "success" not in text
    rows = [{**row, "success_rate": 0.5, "success_ci95": [0.4, 0.6]} for row in sweep_rows()]
    lines = format_table(rows).splitlines()
    assert "[0.400, 0.600]" in lines[2]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_band_is_drawn_of_any_number_of_seeds(tmp_path, count):
    seeds = [{"step": [1, 2, 3], "evaluation/return": [1.0, 2.0, 3.0 + i]} for i in range(count)]
    assert _is_png(plot_finetuning_bands({"hopper": seeds}, tmp_path / "bands.png", bases={"hopper": 1.0}))
