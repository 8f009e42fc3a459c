"""State, metrics and progress bar of a fine-tuning run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from flowpolicy.finetuning.algorithm import ChunkLearning
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.loggers import Loggers
from flowpolicy.runs.progress import progress_bar

STATE_FILE = "training_state.zip"


class Recorder(BaseCallback):
    """After every iteration: metrics to the loggers, the state to ``run_dir``, now and then an evaluation.

    Args:
        run_dir: takes the state; None on all processes but the first, which only train.
        total_steps: of the whole run, for the bar.
        save_every: iterations between saved states.
        evaluate_every: environment steps between evaluations; 0 is never.
        evaluate: called with the policy as deployed, returns metrics.
        loggers: receive the metrics.
    """

    model: ChunkLearning

    def __init__(
        self,
        run_dir: Path | None,
        *,
        total_steps: int,
        save_every: int,
        evaluate_every: int,
        evaluate: Callable[[FlowPolicy], Mapping[str, float]],
        loggers: Loggers,
    ) -> None:
        super().__init__()
        self.run_dir, self.save_every = run_dir, save_every
        self.evaluate_every, self.evaluate, self.loggers = evaluate_every, evaluate, loggers
        self._total = total_steps if run_dir is not None else None

    def _on_training_start(self) -> None:
        self._iteration, self._steps = self.model.iteration, self.model.num_timesteps
        self._time, self._seconds = time.perf_counter(), dict(self.model.seconds)
        self._bar = progress_bar(self._total, "fine-tune", done=self._steps)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.iteration > self._iteration:
            self._record()

    def _on_training_end(self) -> None:
        if self.model.iteration > self._iteration:
            self._record(is_last=True)
        self._bar.close()

    def _record(self, is_last: bool = False) -> None:
        """One iteration is done."""
        model = self.model
        metrics = {name: float(value) for name, value in model.logger.name_to_value.items()}
        model.logger.name_to_value.clear()
        metrics |= self._rollout_metrics()
        now, steps = time.perf_counter(), model.num_timesteps - self._steps
        metrics["time/steps_per_s"] = steps / (now - self._time)
        for name, seconds in model.seconds.items():
            metrics[f"time/{name}_s"] = seconds - self._seconds[name]
        if self.run_dir is not None:
            crossed = self.evaluate_every and (
                self._steps // self.evaluate_every != model.num_timesteps // self.evaluate_every
            )
            if crossed and not is_last:
                metrics |= self.evaluate(model.deployed_policy())
            self.loggers.log(model.num_timesteps, metrics)
            if is_last or (model.iteration % self.save_every == 0 and not model.gathers):
                model.save(self.run_dir / STATE_FILE)
        model.processes.wait()
        self._bar.update(steps, **_shown(metrics))
        self._iteration, self._steps = model.iteration, model.num_timesteps
        self._time, self._seconds = time.perf_counter(), dict(model.seconds)

    def _rollout_metrics(self) -> dict[str, float]:
        """Means over the last episodes that ended, whole ones, however many iterations they took."""
        episodes, success = self.model.ep_info_buffer, self.model.ep_success_buffer
        metrics = {}
        if episodes:
            metrics["rollout/return"] = float(np.mean([episode["r"] for episode in episodes]))
            metrics["rollout/length"] = float(np.mean([episode["l"] for episode in episodes]))
        if success:
            metrics["rollout/success"] = float(np.mean(success))
        if self.model.worker_restarts:
            metrics["rollout/worker_restarts"] = float(self.model.worker_restarts)
        return metrics


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What fits behind a progress bar."""
    names = {
        "ret": "rollout/return",
        "success": "rollout/success",
        "kl": "train/kl_last",
        "value": "train/value",
        "clip": "train/clip_fraction",
        "noise": "train/noise_std",
        "steps/s": "time/steps_per_s",
    }
    found = {short: metrics.get(name, math.nan) for short, name in names.items()}
    return {short: value for short, value in found.items() if not math.isnan(value)}
