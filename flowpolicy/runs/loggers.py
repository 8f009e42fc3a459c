"""Metrics to a CSV file, TensorBoard or Weights & Biases: the same call for each."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from flowpolicy.errors import FlowPolicyError
from flowpolicy.files.storage import atomic_file
from flowpolicy.optional import optional

LOGGERS = ("csv", "tensorboard", "wandb")


class MetricLogger(Protocol):
    """Takes numbers by name."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` at ``step``."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class Loggers(list[MetricLogger]):
    """Several as one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` with each."""
        for sink in self:
            sink.log(step, metrics)

    def close(self) -> None:
        """Flush each."""
        for sink in self:
            sink.close()


class CSVLogger:
    """One row a step in ``metrics.csv``, a column for every metric seen so far; cut at ``resume_step``."""

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        self.path = run_dir / "metrics.csv"
        self.rows: dict[int, dict[str, Any]] = {}
        self._columns: list[str] = []  # of the file as this run wrote it
        if resume_step and self.path.exists():
            for row in read_metrics(self.path):
                step = int(row["step"])
                if step <= resume_step:
                    self.rows[step] = {**row, "step": step}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row of known columns; a new column, or more of an old step, rewrites the file whole."""
        is_new = step not in self.rows
        row = self.rows.setdefault(step, {"step": step})
        row.update(metrics)
        if is_new and set(row) <= set(self._columns):
            try:
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns, restval="").writerow(row)
            except OSError as error:
                raise FlowPolicyError(
                    f"{self.path} cannot be written ({error.strerror or error}); "
                    "fix that and continue with resume=true."
                ) from error
            return
        self._columns = list(dict.fromkeys(key for row in self.rows.values() for key in row))
        with atomic_file(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows.values())

    def close(self) -> None:
        """Nothing is buffered."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``, empty cells left out; a last line that a killed run cut off is dropped."""
    with path.open(newline="") as file:
        whole = [row for row in csv.DictReader(file) if None not in row.values()]
    return [{key: float(value) for key, value in row.items() if value != ""} for row in whole]


class TensorBoardLogger:
    """Event files in ``run_dir/tensorboard``."""

    def __init__(self, run_dir: Path) -> None:
        with optional("The logger 'tensorboard' is not installed", "logging"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WandbLogger:
    """A Weights & Biases run, offline unless there is an account or the setting ``wandb.mode`` says so."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        with optional("The logger 'wandb' is not installed", "logging"):
            import wandb
        has_account = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
        mode = "online" if has_account else "offline"
        arguments = {"project": "flowpolicy", "mode": mode, "dir": str(run_dir), **settings}
        self.run = wandb.init(config=dict(config), **arguments)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One call of ``wandb.log``."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def build_loggers(
    names: Iterable[str],
    run_dir: Path,
    config: Mapping[str, Any],
    wandb_settings: Mapping[str, Any],
    resume_step: int = 0,
) -> Loggers:
    """The loggers of ``names``; the CSV file is always written, since curves are plotted from it."""
    loggers = Loggers([CSVLogger(run_dir, resume_step)])
    if "tensorboard" in names:
        loggers.append(TensorBoardLogger(run_dir))
    if "wandb" in names:
        loggers.append(WandbLogger(run_dir, config, wandb_settings))
    return loggers
