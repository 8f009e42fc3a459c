"""The supervised trainer: one loop for every objective, one or many processes, CPU or GPU."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowpolicy.data.causes import first_line
from flowpolicy.data.prefetch import Prefetcher
from flowpolicy.data.sampling import Batch, ChunkSampler
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.flow.objective import Auxiliary, Draws, Loss, Metrics
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.flow_policy import sample_chunk
from flowpolicy.pretraining.captured import Backward, CapturedBackward
from flowpolicy.pretraining.config import TrainConfig
from flowpolicy.pretraining.ema import EMA
from flowpolicy.pretraining.state import TrainingState
from flowpolicy.runs.device import has_fused_adam
from flowpolicy.runs.distributed import Processes
from flowpolicy.runs.loggers import Loggers, MetricLogger
from flowpolicy.runs.progress import progress_bar
from flowpolicy.runs.seeds import derived_seed

logger = logging.getLogger(__name__)
VALIDATION_ROWS = 1024
CHECKPOINT = "checkpoint"
WIDE = 128  # below this width the casts cost a CPU more than the matrix products gain


class Trainer:
    """Trains a policy's network and leaves the averaged weights in ``run_dir/checkpoint``.

    Args:
        policy: normalisers fitted; its network is trained in place, ``averaged_policy()`` is the result.
        training: normalised chunks to train on.
        validation: normalised chunks of held-out episodes, or None.
        config: settings.
        run_dir: where training state and checkpoint are kept; None keeps nothing.
        seed: fixes batches, noise and dropout; the policy brings its weights.
        processes: this process among many.
        loggers: receive metrics, on the first process.
        evaluate: called with the averaged policy every ``evaluate_every`` steps, returns metrics.
        settings: saved with the training state; a resumed run must have the same.
        loss: what is trained by; None is the policy's own objective.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        training: ChunkSampler,
        validation: ChunkSampler | None,
        config: TrainConfig,
        *,
        run_dir: Path | None = None,
        seed: int = 0,
        processes: Processes | None = None,
        loggers: list[MetricLogger] | None = None,
        evaluate: Callable[[FlowPolicy], Mapping[str, float]] | None = None,
        settings: Mapping[str, Any] | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.policy, self.loss = policy, loss or policy.objective
        self.training, self.validation, self.config = training, validation, config
        self.run_dir, self.seed, self.loggers = run_dir, seed, Loggers(loggers or [])
        self.processes = processes or Processes()
        self.evaluate, self.settings = evaluate, dict(settings or {})
        unit = self.processes.count * (self.loss.row_multiple if self.processes.count > 1 else 1)
        if config.batch_size % unit:
            raise ConfigError(
                f"train.batch_size is {config.batch_size}; with {self.processes.count} processes it must be "
                f"a multiple of {unit}."
            )
        auxiliary = self.loss.auxiliary
        own = None if auxiliary is None else auxiliary.network
        for module in filter(None, (policy, own)):
            self.processes.share(module.state_dict().values())
        self.ema = EMA(policy.network, config.ema_decay)
        self.optimizer = _optimizer(policy.network, config, auxiliary)
        self.state = TrainingState(policy.network, self.ema.network, self.optimizer, auxiliary=own)
        # With images a batch takes a while to put together.
        has_images = any(value.dtype == torch.uint8 for value in training.observation.values())
        self._batches = Prefetcher(self.batch, config.steps) if has_images else None
        self._backward: Backward | None = None
        self._started = time.perf_counter()
        self._autocast = _autocast_dtype(
            config.precision, policy.device, getattr(policy.config.model, "width", 0)
        )

    def resume(self) -> bool:
        """Continue from ``run_dir`` where it holds a training state; returns whether it does."""
        return self.run_dir is not None and self.state.load(self.run_dir, self.settings)

    def run(self) -> FlowPolicy:
        """Train to ``config.steps`` and return the policy with averaged weights.

        Raises:
            FlowPolicyError: when the loss is no longer finite; the last checkpoint stays.
        """
        config, first = self.config, self.state.step
        started = self._started = time.perf_counter()
        sums: dict[str, Tensor] = {}
        shown: dict[str, float] = {}
        count = 0  # steps in sums: fewer than log_every where a resumed run starts between two logs
        total = config.steps if self.processes.is_first else None
        with progress_bar(total, f"train {self.policy.spec.name}", done=first) as bar:
            while self.state.step < config.steps:
                for name, value in self.step().items():
                    sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value
                step, count = self.state.step, count + 1
                if step % config.log_every == 0 or step == config.steps:
                    shown = {name: float(value) / count for name, value in sums.items()}
                    shown = self.processes.averaged(shown)  # each process has its own rows
                    sums, count = {}, 0
                    if not all(math.isfinite(value) for value in shown.values()):
                        raise FlowPolicyError(
                            f"The loss is not finite at step {step}; lower train.learning_rate "
                            "(the last saved checkpoint is intact)."
                        )
                    rate = config.batch_size * (step - first) / (time.perf_counter() - started)
                    rates = {"train/learning_rate": self._learning_rate(step), "train/samples_per_s": rate}
                    self._log(shown | rates)
                self._now_and_then(step)
                bar.update(1, loss=shown.get("loss/total", math.nan))
        if self._batches is not None:
            self._batches.close()
        return self.averaged_policy()

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; returns metrics as scalar tensors (not synchronised with the device)."""
        step, config, network = self.state.step, self.config, self.policy.network
        batch, draws = self.batch(step) if self._batches is None else self._batches(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["relative_rate"] * self._learning_rate(step)
        network.train()
        torch.manual_seed(derived_seed(self.seed, step, self.processes.rank + 1))  # dropout
        if self._backward is None:
            self._backward = self._made_backward(batch, draws)
        metrics = self._backward(batch, draws)
        groups = self.optimizer.param_groups
        self.processes.average_gradients(each for group in groups for each in group["params"])
        norm = self._clip_gradients(config.gradient_clip)
        self.optimizer.step()
        self.ema.update(step)
        self.state.step = step + 1
        return {**metrics, "train/gradient_norm": norm}

    def backward(self, batch: Batch, draws: Draws) -> Metrics:
        """The gradients of a batch's loss in the network's parameters; returns metrics."""
        with torch.autocast(self.policy.device.type, self._autocast, enabled=self._autocast is not None):
            loss, metrics = self.loss.loss(self.policy.network, batch, draws, self.ema.network)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss/total": loss.detach(), **metrics}

    def _clip_gradients(self, most: float) -> Tensor:
        """Scale the network's gradients to a norm of at most ``most``; returns what it was."""
        parameters = list(self.policy.network.parameters())
        norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        # To look at it would make a GPU wait; a CPU is spared a pass over all gradients.
        if norm.device.type != "cpu" or norm > most:
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return norm

    def _made_backward(self, batch: Batch, draws: Draws) -> Backward:
        """``backward``, on a GPU as a CUDA graph where what it computes can be captured."""
        if self.policy.device.type != "cuda":
            return self.backward
        if self._batches is not None:
            self._batches.settle()  # while a graph is captured, no other thread may use the GPU
        try:
            return CapturedBackward(self.backward, batch, draws)
        except RuntimeError as error:  # as a user's own network or loss may give
            logger.warning(
                "Training goes on without a CUDA graph, which is slower (%s).", first_line(error).rstrip(".")
            )
            return self.backward

    def batch(self, step: int) -> tuple[Batch, Draws]:
        """This process's rows of the global batch of ``step``, and the random draws of its loss."""
        config, device = self.config, self.policy.device
        rows = self.processes.rows(config.batch_size)
        index = self.training.rows(step, config.batch_size, self.seed)[rows]
        generator = torch.Generator(device).manual_seed(derived_seed(self.seed, step, 0))
        shape = (config.batch_size, *self.policy.spec.noise_shape)
        batch, draws = self.training.batch(index.to(device)), self.loss.draw(shape, generator, device)[rows]
        return batch, self._paired(draws, batch, step / config.steps)

    def _paired(self, draws: Draws, batch: Batch, done: float) -> Draws:
        return draws if batch.noise is None else self.loss.pair(draws, batch.noise, done)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss and open-loop action error of the averaged network on held-out episodes.

        The error is the root mean square, over executed actions and dimensions, of sampled minus
        demonstrated, in normalised units; noise and rows are the same at every call, and the noise is that of
        the actions where they have one. Where there are several data sets, each has its own besides, under
        its name.
        """
        assert self.validation is not None
        metrics = self._validated(range(len(self.validation)))
        for name, windows in self.validation.parts.items():
            metrics |= {f"{key}/{name}": value for key, value in self._validated(windows).items()}
        return metrics

    def _validated(self, windows: range) -> dict[str, float]:
        assert self.validation is not None
        network, device = self.ema.network, self.policy.device
        generator = torch.Generator(device).manual_seed(self.seed)
        count = min(VALIDATION_ROWS, len(windows))
        index = torch.linspace(windows[0], windows[-1], count).long().to(device)
        batch = self.validation.batch(index)
        shape = (count, *self.policy.spec.noise_shape)
        draws = self._paired(self.loss.draw(shape, generator, device), batch, 1.0)
        loss, _ = self.loss.loss(network, batch, draws, network)
        noise = torch.randn(shape, generator=generator, device=device) if batch.noise is None else batch.noise
        bound, objective = self.policy.config.action_clip, self.policy.objective
        chunk = sample_chunk(network, objective, batch.observation, noise, self.policy.sampling, bound)
        squared = ((chunk - batch.action) ** 2)[batch.mask]
        return {"validation/loss": float(loss), "validation/action_error": float(squared.mean().sqrt())}

    def averaged_policy(self) -> FlowPolicy:
        """A policy of its own with the averaged weights and this one's normalisers."""
        result = FlowPolicy(self.policy.config).to(self.policy.device)
        result.load_state_dict(self.policy.state_dict())
        result.network.load_state_dict(self.ema.network.state_dict())
        return result.eval()

    def save(self) -> None:
        """Write the training state and the averaged policy; either is replaced as a whole."""
        if self.run_dir is not None and self.processes.is_first:
            self.averaged_policy().save(self.run_dir / CHECKPOINT)
            self.state.save(self.run_dir, self.settings, time.perf_counter() - self._started)

    def _now_and_then(self, step: int) -> None:
        """Validation, evaluation and saving, each at its own interval and at the end."""
        config, is_last = self.config, step == self.config.steps
        if self.processes.is_first:
            every = config.validate_every
            if self.validation is not None and every and (step % every == 0 or is_last):
                self._log(self.validate())
            every = config.evaluate_every
            if self.evaluate is not None and every and step % every == 0 and not is_last:
                self._log(self.evaluate(self.averaged_policy()))
        if step % config.save_every == 0 or is_last:
            self.save()
            self.processes.wait()

    def _log(self, metrics: Mapping[str, float]) -> None:
        if self.processes.is_first:
            self.loggers.log(self.state.step, metrics)

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from the peak to ``final_learning_rate`` of it."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return config.learning_rate * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


def _optimizer(network: nn.Module, config: TrainConfig, auxiliary: Auxiliary | None) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, in one fused kernel where the device has it; none on an
    auxiliary network's, which have a rate and betas of their own.
    """
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    others = [p for p in network.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "relative_rate": 1.0},
        {"params": others, "weight_decay": 0.0, "relative_rate": 1.0},
    ]
    if auxiliary is not None:
        own = list(auxiliary.network.parameters())
        groups.append(
            {
                "params": own,
                "weight_decay": 0.0,
                "relative_rate": auxiliary.relative_rate,
                "betas": auxiliary.betas,
            }
        )
    fused = has_fused_adam(next(network.parameters()).device)
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


def _autocast_dtype(precision: str, device: torch.device, width: int) -> torch.dtype | None:
    """bfloat16 or None (float32). A CPU without AVX-512 BF16 would run bfloat16 many times slower."""
    if precision == "float32":
        return None
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported()
    else:
        has_bfloat16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and width >= WIDE
    return torch.bfloat16 if has_bfloat16 or precision == "bfloat16" else None
