"""What a GPU gives: pretraining, training throughput, chunk latency and caching, in float32 and bfloat16, on one GPU.

    python benchmarks/gpu.py --checkout PATH        # of real-stanford/diffusion_policy; parts that are missing
    python benchmarks/gpu.py --checkout PATH --parts latency

`training`: samples a second of our trainer beside Diffusion Policy's transformer, optimiser and EMA, all of them with
their data in the GPU's memory, turn by turn. `pretraining`: the command of the README for Push-T with the network
that wants a GPU (256 x 8), in both precisions, and what its policies score. `latency`: chunks of the shipped Hopper
policy and of that Push-T policy in every backend and precision; `beside Diffusion Policy`: and of its transformer at
equal sizes. `caching`: cache schedules of the Push-T policy at K = 100, and `caching, latency and scores`: what they take
and score beside fewer steps. `reinflow, ...`, `expo, ...`, `qchunk, ...`, `dsrl, ...`: iterations of fine-tuning on Hopper,
with the policy on the GPU (`cuda`) and on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peers.diffusion_policy_sampler import DDPMSampler, build_model
from sampler_latency import our_policy

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.caching.calibration import CalibrationConfig, calibrate_checkpoint
from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.latency import LatencyConfig, benchmark_checkpoint
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.data.sampling import ChunkSampler
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval, percentiles
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.pretraining.config import TrainConfig
from flowpolicy.pretraining.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
SIZES = ((96, 2), (128, 4), (256, 8))  # width, depth: model=small, medium, large
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("cuda", "cpu")
METHODS = ("uniform", "acs+bua", "searched")
HOPPER = "benchmarks/checkpoints/hopper-shortcut-seed0"
HOPPER_TOKEN = "benchmarks/checkpoints/hopper-flow_matching-4-a-token-seed0"
OBSERVATION, OBS_STEPS, ACTION, CHUNK, HEADS = 20, 2, 2, 16, 4  # Push-T's
DEVICE = torch.device("cuda")
Step = Callable[[], object]


class Benchmark:
    """The parts, and the sizes of a whole measurement or of a trial."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.checkout, self.trial = arguments.checkout, bool(arguments.trial)
        self.runs = Path(arguments.runs)
        self.steps = 60 if self.trial else int(arguments.steps)

    # Pretraining -----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Path:
        """Of the part `pretraining, bfloat16`, which another machine may have done."""
        folder = self.runs / "pusht-large-bfloat16"
        if not (folder / "summary.json").exists():
            self.pretraining("bfloat16")
        return folder / "checkpoint"

    def pretraining(self, precision: str) -> dict[str, Any]:
        folder = self.runs / f"pusht-large-{precision}"
        command = [
            "scripts/pretrain.py", "env=pusht", "policy=flow_matching", "model=large",
            f"train.steps={self.steps}", "train.batch_size=256", f"train.precision={precision}",
            f"train.final_episodes={4 if self.trial else 50}", "video=false", "device=cuda", "resume=true",
            f"run_dir={folder}",
        ]  # fmt: skip
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        summary = cast("dict[str, Any]", read_json(folder / "summary.json"))
        with (folder / "metrics.csv").open() as stream:
            rates = [row["train/samples_per_s"] for row in csv.DictReader(stream)]
        found = summary["metrics"] | {
            "steps": self.steps,
            "samples_per_second": [float(rate) for rate in rates if rate][-1],
            "command": " ".join(["python", *command]),
        }
        print(json.dumps(found), flush=True)
        return found

    # Training --------------------------------------------------------------------------------------------------------

    def training(self) -> dict[str, Any]:
        rows = []
        for width, depth in SIZES:
            for batch in (64, 256, 1024):
                steps: dict[str, Step] = {}
                for precision in PRECISIONS:
                    steps[f"flowpolicy, {precision}"] = self._our_step(width, depth, batch, precision)
                    steps[f"diffusion policy, {precision}"] = self._peer_step(width, depth, batch, precision)
                rates = self._rates(steps, batch)
                rows.append(
                    {"width": width, "depth": depth, "batch_size": batch, "samples_per_second": rates}
                )
                print(
                    width,
                    depth,
                    batch,
                    {name: round(value["median"]) for name, value in rates.items()},
                    flush=True,
                )
        return {"rows": rows, "objective": "flow matching", "chunk": CHUNK, "num_heads": HEADS}

    def _our_step(self, width: int, depth: int, batch: int, precision: str) -> Step:
        policy = our_policy(width, depth, HEADS, dropout=0.01).to(DEVICE)
        count = 20_000
        chunks = ChunkSampler(
            {"observation": torch.randn(count, OBSERVATION, device=DEVICE)},
            torch.randn(count, ACTION, device=DEVICE).clamp(-1, 1),
            np.arange(100, count + 1, 100), OBS_STEPS, CHUNK,
        )  # fmt: skip
        config = TrainConfig(batch_size=batch, steps=1_000_000, precision=precision)
        return Trainer(policy, chunks, None, config).step

    def _peer_step(self, width: int, depth: int, batch: int, precision: str) -> Step:
        """Theirs as published, but for its loader: its batches are cut from tensors on the GPU."""
        model: Any = build_model(self.checkout, width=width, depth=depth, num_heads=HEADS).to(DEVICE)
        from diffusion_policy.model.diffusion.ema_model import EMAModel

        optimizer = model.configure_optimizers(learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95))
        ema = EMAModel(copy.deepcopy(model), update_after_step=0, inv_gamma=1.0, power=0.75, max_value=0.9999)
        model.train()
        actions = torch.randn(20_000, CHUNK, ACTION, device=DEVICE)
        observations = torch.randn(20_000, OBS_STEPS, OBSERVATION, device=DEVICE)

        def step() -> None:
            rows = torch.randint(len(actions), (batch,), device=DEVICE)
            action, observation = actions[rows], observations[rows]
            noise, t = torch.randn_like(action), torch.rand(batch, device=DEVICE)
            weight = t[:, None, None]
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                velocity = model((1 - weight) * noise + weight * action, 100 * t, observation)
            loss = torch.nn.functional.mse_loss(velocity.float(), action - noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step(model)

        return step

    def _rates(self, steps: Mapping[str, Step], batch: int) -> dict[str, dict[str, float]]:
        turn, rounds = (3, 2) if self.trial else (10, 7)
        for step in steps.values():
            for _ in range(turn):
                step()
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(turn):
                    step()
                torch.cuda.synchronize()
                found[name].append(turn * batch / (time.perf_counter() - started))
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in found.items()
        }

    # Latency ---------------------------------------------------------------------------------------------------------

    def _timed(
        self, checkpoint: Path | str, num_steps: tuple[int, ...], calls: int, **more: Any
    ) -> dict[str, Any]:
        chosen = {"backends": ("eager", "compile", "cuda_graph"), **more}
        config = LatencyConfig(
            str(checkpoint), num_steps, dtypes=PRECISIONS, calls=10 if self.trial else calls, warm_up=5,
            round_calls=10, observations=16, device="cuda", **chosen,
        )  # fmt: skip
        report = benchmark_checkpoint(config)
        print(report.table(), flush=True)
        return report.content()

    def latency(self) -> dict[str, Any]:
        large = self.checkpoint()
        found = {
            "hopper, shortcut": self._timed(ROOT / HOPPER, (1, 4), 400),
            "push-t, 256 x 8": self._timed(large, (4, 10), 200),
            "push-t, 256 x 8, batch of 16": self._timed(large, (4, 10), 100, batch_size=16),
        }
        return {"policies": found}

    def beside_peer(self) -> dict[str, Any]:
        """Ours and theirs at equal sizes and K, batch of 1, call by call; theirs also compiled and captured."""
        policy = our_policy(256, 8, HEADS).to(DEVICE)
        model: Any = build_model(self.checkout, width=256, depth=8, num_heads=HEADS).to(DEVICE)
        fast = torch.compile(model, mode="reduce-overhead")
        noise = torch.randn(1, CHUNK, ACTION, device=DEVICE)
        observation = torch.randn(1, OBS_STEPS, OBSERVATION, device=DEVICE)
        found = []
        for num_steps, rounds in ((10, 200), (100, 40)):
            injected = torch.randn(num_steps, 1, CHUNK, ACTION, device=DEVICE)
            calls: dict[str, Step] = {
                f"diffusion policy, {how}, {str(dtype)[6:]}": _peer_call(
                    called, dtype, num_steps, observation, noise, injected
                )
                for how, called, dtype in (
                    ("eager", model, torch.float32),
                    ("eager", model, torch.bfloat16),
                    ("compiled with graphs", fast, torch.bfloat16),
                )
            }
            for backend in ("eager", "compile", "cuda_graph"):
                for precision in PRECISIONS:
                    sampler = build_sampler(
                        policy, batch_size=1, num_steps=num_steps, backend=backend, dtype=precision
                    )
                    calls[f"flowpolicy, {backend}, {precision}"] = (
                        lambda s=sampler: s({"observation": observation}, noise=noise)  # type: ignore[misc]
                    )
            times = _in_turns(calls, 5 if self.trial else rounds)
            rows = {name: percentiles(np.array(values)) for name, values in times.items()}
            for name, row in rows.items():
                print(f"{name}, K = {num_steps}: {row['p50']:.2f} ms", flush=True)
            found.append({"num_steps": num_steps, "rounds": rounds, "milliseconds": rows})
        return {"rows": found}

    # Caching ---------------------------------------------------------------------------------------------------------

    def caching(self) -> dict[str, Any]:
        iterations = 4 if self.trial else 400
        config = CalibrationConfig(str(self.checkpoint()), 100, search_iterations=iterations, device="cuda")
        calibrated, _ = calibrate_checkpoint(config)
        print(calibrated.table(), flush=True)
        for method in METHODS:
            calibrated.schedules[method].save(self.schedule(method))
        return {"calibration": calibrated.metrics()}

    def schedule(self, method: str) -> Path:
        return self.runs / "schedules" / f"{method}.json"

    def schedules(self) -> dict[str, Any]:
        checkpoint, files = self.checkpoint(), tuple(str(self.schedule(each)) for each in METHODS)
        if not all(Path(file).exists() for file in files):
            self.caching()
        return {
            "scores": self._scores(checkpoint),
            "latency": self._timed(
                checkpoint, (100, 10), 20, schedules=files, backends=("eager", "cuda_graph")
            ),
        }

    def _scores(self, checkpoint: Path) -> dict[str, Any]:
        """Push-T's score of the full computation, of schedules and of fewer steps, on the same environments and x_0."""
        policy = FlowPolicy.load(checkpoint, DEVICE)
        task = task_of(policy.spec.task, None, str(checkpoint))
        episodes = 4 if self.trial else 50
        arms: dict[str, tuple[int, Schedule | None]] = {"full, K = 100": (100, None)}
        arms["searched"] = (100, Schedule.load(self.schedule("searched")))
        arms["full, K = 10"] = (10, None)
        scores: dict[str, Any] = {}
        for name, (num_steps, schedule) in arms.items():
            sampler = build_sampler(
                policy, batch_size=50, num_steps=num_steps, schedule=schedule, backend="cuda_graph"
            )
            result = evaluate(
                sampler,
                task,
                episodes=episodes,
                seed=EVALUATION_SEED,
                num_envs=min(50, episodes),
                show_progress=False,
            )
            assert result.score is not None
            scores[name] = result.score
            print(f"{name}: {result.score.mean():.3f}", flush=True)
        whole = scores["full, K = 100"]
        return {
            name: {
                "score": values.tolist(),
                "mean": float(values.mean()),
                "ci95": mean_interval(values),
                "minus_full_ci95": paired_difference_interval(values, whole),
            }
            for name, values in scores.items()
        } | {"episodes": episodes, "first_seed": EVALUATION_SEED, "intervals_over": "episodes"}

    # Fine-tuning -----------------------------------------------------------------------------------------------------

    def reinflow(self, device: str) -> dict[str, Any]:
        steps = (2 if self.trial else 6) * 8192
        return self._iterations(device, "reinflow", "finetune_reinflow", HOPPER, f"total_steps={steps}")

    def off_policy(self, algorithm: str, device: str) -> dict[str, Any]:
        steps = 2300 if self.trial else 4000  # of which the first 2000 have no update
        options = f"algorithm={algorithm}", f"total_steps={steps}", "workers=0"
        return self._iterations(device, algorithm, "finetune_offpolicy", HOPPER_TOKEN, *options)

    def _iterations(
        self, device: str, name: str, script: str, checkpoint: str, *options: str
    ) -> dict[str, Any]:
        """Median seconds of the parts of an iteration, among those in which something was updated."""
        folder = self.runs / f"hopper-{name}-{device}"
        command = [
            f"scripts/{script}.py", "env=hopper", f"checkpoint={checkpoint}", *options, "final_episodes=2",
            "video=false", f"device={device}", "resume=true", f"run_dir={folder}",
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        rows = [
            {key: float(value) for key, value in row.items() if key.startswith("time/") and value}
            for row in csv.DictReader((folder / "metrics.csv").open())
        ]
        rows = [row for row in rows if row.get("time/update_s")]
        found = {
            "times": {key: statistics.median(row[key] for row in rows if key in row) for key in rows[-1]},
            "iterations": len(rows),
            "wall_seconds": time.perf_counter() - started,
            "command": " ".join(["python", *command]),
        }
        print(json.dumps(found), flush=True)
        return found


def _peer_call(
    model: Any, dtype: torch.dtype, num_steps: int, observation: Any, noise: Any, injected: Any
) -> Step:
    sampler = DDPMSampler(_WithTimes(model), num_steps)
    sampler.table = [(t.to(DEVICE), *rest) for t, *rest in sampler.table]

    def call() -> object:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            return sampler(observation, noise, injected)

    return call


class _WithTimes(torch.nn.Module):
    """A model whose output outlives its next call, which CUDA graphs of torch.compile do not promise."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any, t: Any, cond: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return self.model(x, t, cond).float().clone()


def _in_turns(calls: Mapping[str, Step], rounds: int, warm_up: int = 4) -> dict[str, list[float]]:
    """Milliseconds of each call of each function."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - started))
    return times


PARTS: dict[str, Callable[[Benchmark], dict[str, Any]]] = {
    "training": Benchmark.training,
    "pretraining, bfloat16": lambda benchmark: benchmark.pretraining("bfloat16"),
    "latency": Benchmark.latency,
    "caching": Benchmark.caching,
    "caching, latency and scores": Benchmark.schedules,
    "pretraining, float32": lambda benchmark: benchmark.pretraining("float32"),
    **{f"reinflow, {device}": partial(Benchmark.reinflow, device=device) for device in DEVICES},
    **{
        f"{algorithm}, {device}": partial(Benchmark.off_policy, algorithm=algorithm, device=device)
        for algorithm in ("expo", "qchunk", "dsrl")
        for device in DEVICES
    },
    "beside Diffusion Policy": Benchmark.beside_peer,  # last: on an H200 its launches failed
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="of real-stanford/diffusion_policy")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: those missing in the output")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps of pretraining")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "benchmarks" / "gpu"))
    parser.add_argument("--trial", action="store_true", help="as little as possible of everything")
    parser.add_argument("--output", default=str(RESULT))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a GPU.")
    benchmark, path = Benchmark(arguments), Path(arguments.output)
    content: dict[str, Any] = cast("dict[str, Any]", read_json(path)) if path.exists() else {"parts": {}}
    for part in arguments.parts or [name for name in PARTS if name not in content["parts"]]:
        started = time.perf_counter()
        found = PARTS[part](benchmark)
        content["parts"][part] = found | {
            "part_seconds": time.perf_counter() - started,
            "machine": machine(),
            "versions": versions(),
            "git_commit": git_state()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        missing = [name for name in PARTS if name not in content["parts"]]
        content |= {
            "command": "python benchmarks/gpu.py --checkout PATH",
            "missing": missing,
            "complete": not missing,
        }
        write_json(path, content)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
