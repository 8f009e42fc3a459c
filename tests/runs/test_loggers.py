import csv
import sys
import types

import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.runs.loggers import build_loggers, read_metrics


def build(names, run_dir, **settings):
    return build_loggers(names, run_dir, {"seed": 1}, settings.pop("wandb", {}), **settings)


def test_csv_gathers_a_row_per_step_and_a_column_per_metric(tmp_path):
    (sink,) = build([], tmp_path)  # the curves are drawn from it, so it is always there
    sink.log(10, {"loss": 0.5})
    sink.log(20, {"loss": 0.25})
    sink.log(20, {"return": 3})
    sink.close()
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 10, "loss": 0.5},
        {"step": 20, "loss": 0.25, "return": 3},
    ]
    with (tmp_path / "metrics.csv").open() as file:
        assert next(csv.reader(file)) == ["step", "loss", "return"]


def test_a_resumed_csv_drops_what_was_logged_after_the_checkpoint(tmp_path):
    (sink,) = build(["csv"], tmp_path)
    for step in (10, 20, 30):
        sink.log(step, {"loss": step})
    (resumed,) = build(["csv"], tmp_path, resume_step=20)
    resumed.log(30, {"loss": -1})
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.csv")] == [10, 20, -1]
    (fresh,) = build(["csv"], tmp_path)
    fresh.log(1, {"loss": 7})
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "loss": 7}]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, sink = build(["tensorboard"], tmp_path)
    sink.log(10, {"loss/total": 0.5})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [(10, 0.5)]


@pytest.fixture
def fake_wandb(monkeypatch):
    """Records calls in the place of the service."""

    class Run:
        def log(self, metrics, step):
            calls.append(("log", metrics, step))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    calls = []
    module = types.ModuleType("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_stays_offline_without_an_account(tmp_path, monkeypatch, fake_wandb):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _, sink = build(["wandb"], tmp_path)
    sink.log(3, {"loss": 1.0})
    sink.close()
    assert fake_wandb[0][1]["mode"] == "offline"
    assert fake_wandb[0][1]["config"] == {"seed": 1}
    assert fake_wandb[1:] == [("log", {"loss": 1.0}, 3), ("finish",)]
    build(["wandb"], tmp_path, wandb={"mode": "disabled", "project": "mine"})
    assert fake_wandb[-1][1]["mode"] == "disabled"
    assert fake_wandb[-1][1]["project"] == "mine"


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_backend_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"'{name}'.*flowpolicy\[logging\]"):
        build([name], tmp_path)
