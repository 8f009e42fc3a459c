"""Latency of samplers: percentiles over many calls, with their error and a lower bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.floor import Floor, Machine, floor_of, measure_machine
from flowpolicy.acceleration.observations import (
    CALIBRATION_SEED,
    observations_of,
    recording_of,
    rows_of,
)
from flowpolicy.acceleration.sampler import BACKENDS, build_sampler
from flowpolicy.errors import BackendError
from flowpolicy.evaluation.statistics import percentiles
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.ranges import PositiveInt, at_least, not_empty, one_of
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.progress import progress
from flowpolicy.settings import Settings

_Backends = Annotated[tuple[Annotated[str, one_of(BACKENDS)], ...], not_empty("backend")]
_DTYPES = {"float32": tuple(BACKENDS), "bfloat16": ("eager", "compile", "cuda_graph"), "int8": ("onnx",)}


@dataclass(frozen=True)
class LatencyConfig(Settings):
    """Settings of `scripts/benchmark_latency.py`.

    Attributes:
        checkpoint: folder of the policy.
        num_steps: the K to time; empty takes the policy's own.
        solver: ODE solver, or the file of a searched one; None takes the policy's own.
        grid: ``name`` and settings of the grid of flow times; None takes the policy's own.
        backends: any of ``eager``, ``compile``, ``onnx``, ``cuda_graph``; a GPU's is left out on a CPU.
        dtypes: any of ``float32``, ``bfloat16``, ``int8``; combinations that a backend lacks are left out.
        schedules: files of cache schedules; each is timed at its own K.
        calls: timed calls of each sampler, after the warm-up.
        warm_up: calls before.
        round_calls: calls of one sampler before the next one has its turn.
        batch_size: observations per call.
        observations: recorded ones that the calls go through.
        seed: environment seed of the episodes they come from, and of the noises.
        device: of the policy; ``auto`` takes a GPU where there is one.
        threads: CPU threads.
    """

    checkpoint: str
    num_steps: tuple[int, ...] = ()
    solver: str | None = None
    grid: dict[str, Any] | None = None
    backends: _Backends = (
        "eager",
        "compile",
        "onnx",
        "cuda_graph",
    )
    dtypes: tuple[Annotated[str, one_of(_DTYPES)], ...] = ("float32",)
    schedules: tuple[str, ...] = ()
    calls: PositiveInt = 2000
    warm_up: Annotated[int, at_least(1, "at least 1: a first call is not like the others")] = 20
    round_calls: PositiveInt = 50
    batch_size: PositiveInt = 1
    observations: PositiveInt = 64
    seed: int = CALIBRATION_SEED + 1000
    device: str = "auto"
    threads: PositiveInt = 1


@dataclass(frozen=True)
class Row:
    """One sampler's figures.

    Attributes:
        backend: that ran it.
        dtype: of the network.
        num_steps: K.
        method: of the schedule; ``full`` recomputes everything.
        share: f, blocks recomputed.
        nfe: network evaluations.
        milliseconds: p50, p95, p99, p99.9 and max of a call.
        encode_milliseconds: p50 of encoding the observation, which is part of it; NaN where it is captured
            with the rest in one graph.
        calls: timed.
        rms_error: of the action against full float32 computation at the largest K timed, same noise,
            normalised units.
        memory_mb: growth of the process (of the GPU's memory) from before it was built.
        build_seconds: until it could be called.
        floor: least time possible on this machine.
    """

    backend: str
    dtype: str
    num_steps: int
    method: str
    share: float
    nfe: int
    milliseconds: dict[str, float]
    encode_milliseconds: float
    calls: int
    rms_error: float
    memory_mb: float
    build_seconds: float
    floor: Floor


@dataclass(frozen=True)
class LatencyReport:
    """Rows, the machine's measured limits, and what could not run here."""

    task: str
    rows: list[Row]
    machine: Machine
    threads: int
    device: str
    missing: list[str]

    def table(self) -> str:
        """Markdown."""
        head = "backend | dtype | K | schedule | f | p50 ms | p95 | p99 | p99.9 | max | encoding | floor ms"
        with_kernels = self.device != "cpu"
        head += " | with launches" if with_kernels else ""
        head += " | rms error | memory MB"
        lines = [f"| {head} |", "| --- " * (head.count("|") + 1) + "|"]
        for row in self.rows:
            times = " | ".join(f"{value:.2f}" for value in row.milliseconds.values())
            floor = f"{row.floor.milliseconds:.3f}"
            if with_kernels:
                floor += f" | {row.floor.with_launches:.3f}"
            what = f"{row.backend} | {row.dtype} | {row.num_steps} | {row.method}"
            lines.append(
                f"| {what} | {row.share:.3f} | {times} | {row.encode_milliseconds:.2f} | {floor} | "
                f"{row.rms_error:.4f} | {row.memory_mb:.0f} |"
            )
        return "\n".join([*lines, *(f"{name}: not measured" for name in self.missing)])

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "task": self.task,
            "threads": self.threads,
            "device": self.device,
            "machine_limits": asdict(self.machine),
            "not_measured": self.missing,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write ``latency.json`` and ``latency.png``."""
        from flowpolicy.plots.caching import plot_latency

        write_json(folder / "latency.json", self.content())
        points = {
            f"{row.backend}, {row.dtype}, {row.method}": [
                (other.milliseconds["p50"], other.rms_error, other.num_steps)
                for other in self.rows
                if (other.backend, other.dtype, other.method) == (row.backend, row.dtype, row.method)
            ]
            for row in self.rows
        }
        return [folder / "latency.json", plot_latency(points, folder / "latency.png", title=self.task)]


def benchmark_checkpoint(config: LatencyConfig, env: Mapping[str, Any] | None = None) -> LatencyReport:
    """Build every sampler that was asked for and can run here, and time them turn by turn.

    Raises:
        FlowPolicyError: a setting, the checkpoint, a schedule or the task is not usable.
    """
    torch.set_num_threads(config.threads)
    policy = FlowPolicy.load(config.checkpoint, resolve_device(config.device))
    task = task_of(policy.spec.task, env, config.checkpoint)
    schedules = [Schedule.load(path) for path in config.schedules]
    for given in schedules:
        given.check(policy, SamplerSpec(**given.key.sampling()))
    recorded = observations_of(
        policy, task, config.observations, episodes=8, seed=config.seed, demonstrations=recording_of(env)
    )
    rows = config.batch_size
    batches = [
        rows_of(recorded, torch.arange(start, start + rows) % config.observations)
        for start in range(0, config.observations, rows)
    ]
    noise = torch.randn(
        len(batches), rows, *policy.spec.noise_shape,
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip
    wished: list[tuple[SamplerSpec, Schedule | None]] = [
        (policy.checked(SamplerSpec(num_steps=k, solver=config.solver, grid=config.grid)), None)
        for k in config.num_steps or (None,)
    ]
    wished += [(policy.checked(SamplerSpec(**given.key.sampling())), given) for given in schedules]
    finest = max((sampling for sampling, _ in wished), key=lambda sampling: sampling.steps)
    reference = build_sampler(policy, finest, batch_size=rows, backend="eager")
    wanted = torch.stack([reference(batch, x) for batch, x in zip(batches, noise, strict=True)])
    samplers, missing = [], []
    for backend in config.backends:
        for dtype in config.dtypes:
            if backend not in _DTYPES[dtype]:
                continue
            try:
                for wish, (sampling, schedule) in enumerate(wished):
                    sampling = replace(sampling, backend=backend, dtype=dtype)
                    samplers.append(_Timed(policy, config.batch_size, sampling, schedule, wish))
                    samplers[-1].warm_up(batches, noise, config.warm_up)
            except BackendError as error:
                if len(config.backends) == 1:
                    raise
                missing.append(f"{backend}, {dtype} ({str(error).rstrip('.')})")
    if not samplers:
        raise BackendError("None of the backends runs here: " + "; ".join(missing) + ".")
    rounds = -(-config.calls // config.round_calls)
    for _ in progress(rounds, "timing"):
        for sampler in samplers:
            sampler.run(batches, noise, config.round_calls)
    machine = measure_machine(policy.device)
    floors: dict[int, Floor] = {}  # a floor depends on K and the schedule, not on who computes it
    for timed in samplers:
        if timed.wish not in floors:
            floors[timed.wish] = floor_of(timed.sampler, machine)
    found = [timed.row(batches, noise, wanted, floors[timed.wish]) for timed in samplers]
    return LatencyReport(task.name, found, machine, config.threads, str(policy.device), missing)


class _Timed:
    """A sampler and the times of its calls."""

    def __init__(
        self,
        policy: FlowPolicy,
        batch_size: int,
        sampling: SamplerSpec,
        schedule: Schedule | None,
        wish: int,
    ) -> None:
        self.policy, self.wish = policy, wish
        if policy.device.type == "cuda":  # of this sampler, not of what ran before
            torch.cuda.reset_peak_memory_stats(policy.device)
        self.before = _memory(policy.device)
        started = time.perf_counter()
        self.sampler = build_sampler(policy, sampling, batch_size=batch_size, schedule=schedule)
        self.build_seconds = time.perf_counter() - started
        self.seconds: list[float] = []
        self.encode_seconds: list[float] = []

    def warm_up(self, batches: Sequence[Mapping[str, Tensor]], noise: Tensor, calls: int) -> None:
        self.run(batches, noise, calls)
        self.seconds.clear()
        self.encode_seconds.clear()
        self.memory = (_memory(self.policy.device) - self.before) / 1e6

    def run(self, batches: Sequence[Mapping[str, Tensor]], noise: Tensor, calls: int) -> None:
        on_gpu = self.policy.device.type == "cuda"
        for _ in range(calls):
            index = len(self.seconds) % len(batches)
            started = time.perf_counter()
            self.sampler(batches[index], noise[index])
            if on_gpu:
                torch.cuda.synchronize(self.policy.device)
            self.seconds.append(time.perf_counter() - started)
        encode = getattr(self.sampler.compute, "encode", None)
        if encode is None:
            return
        for batch in batches[: max(1, calls // 5)]:
            checked = self.policy.check_observations(batch)
            started = time.perf_counter()
            encode(checked)
            if on_gpu:
                torch.cuda.synchronize(self.policy.device)
            self.encode_seconds.append(time.perf_counter() - started)

    def row(
        self, batches: Sequence[Mapping[str, Tensor]], noise: Tensor, wanted: Tensor, floor: Floor
    ) -> Row:
        sampler, encode = self.sampler, self.policy.encode
        schedule, sampling = sampler.schedule, sampler.sampling
        differences = [
            encode(sampler(batch, x), batch) - encode(chunk, batch)
            for batch, x, chunk in zip(batches, noise, wanted, strict=True)
        ]
        error = torch.stack(differences).square().mean().sqrt()
        return Row(
            sampling.backend, sampling.dtype, sampling.steps,
            "full" if schedule is None else schedule.method, 1.0 if schedule is None else schedule.share,
            sampler.nfe(), percentiles(np.array(self.seconds) * 1e3),
            1e3 * float(np.median(self.encode_seconds)) if self.encode_seconds else float("nan"),
            len(self.seconds), float(error),
            self.memory, self.build_seconds, floor,
        )  # fmt: skip


def _memory(device: torch.device) -> float:
    """Bytes that the process holds now, or the GPU's allocator has held at most."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no such file outside Linux
        return float("nan")
    return float(pages * 4096)
