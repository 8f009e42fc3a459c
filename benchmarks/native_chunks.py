"""Native chunks against Gymnasium: the same numbers, and how fast.

    python benchmarks/native_chunks.py                     # all parts, about 5 minutes; each adds to the JSON
    python benchmarks/native_chunks.py --part equality --episodes 100

    equality     whole episodes of each task in plain Gymnasium environments, stepped one by one, and natively: the
                 largest difference of rewards, observations and states (float64), and where an end differs
    speed        steps per second of 16 environments, interleaved: native chunks, LocalChunks, WorkerChunks, Gymnasium's
                 SyncVectorEnv and AsyncVectorEnv, and envpool where it is installed
    finetuning   seconds of simulation, inference and update of ReinFlow's iterations on Hopper, interleaved

Where benchmarks/checkpoints has a policy of the task its chunks are played, elsewhere uniformly random ones.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from omegaconf import OmegaConf

from flowpolicy import FlowPolicy
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import Task, make_environment, task_from
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.finetuning.environments import LocalChunks
from flowpolicy.finetuning.native_environments import NativeChunks, NativeTask, Outcomes, native_task
from flowpolicy.finetuning.parallel_environments import WorkerChunks
from flowpolicy.finetuning.reinflow import ReinFlow
from flowpolicy.finetuning.stable_baselines3 import ChunkedVecEnv
from flowpolicy.runs.seeds import derived_seed

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "native-chunks.json"
POLICIES = {
    "hopper": "hopper-shortcut-seed0", "walker2d": "walker2d-shortcut-seed0",
    "halfcheetah": "halfcheetah-shortcut-seed0", "adroit_door": "adroit_door-flow_matching-seed0",
}  # fmt: skip
TASKS = (
    *POLICIES, "ant", "humanoid", "adroit_hammer", "adroit_pen", "adroit_relocate",
)  # fmt: skip
KEYS, STEPS, ENVS = ("observation",), 4, 16
OTHER_PROCESSES = ("WorkerChunks, 2 processes", "AsyncVectorEnv")
"""Whose CPU time is not this process's."""
Sampler = Callable[[np.ndarray], np.ndarray]
"""Observations ``(N, D)`` -> chunks ``(N, STEPS, A)``."""


def task_and_native(name: str) -> tuple[Task, type[NativeTask]]:
    settings: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "env" / f"{name}.yaml"))
    return task_from(settings), native_task(settings["native"])


def sampler(name: str, space: Any) -> Sampler:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    if name not in POLICIES:
        return lambda rows: rng.uniform(space.low, space.high, (len(rows), STEPS, *space.shape))
    policy = FlowPolicy.load(ROOT / "benchmarks" / "checkpoints" / POLICIES[name])

    def sample(rows: np.ndarray) -> np.ndarray:
        noise = torch.randn(len(rows), *policy.spec.noise_shape, generator=generator)
        with torch.no_grad():
            chunks = policy.act({"observation": rows[:, None].astype(np.float32)}, noise=noise, num_steps=1)
        return chunks[:, :STEPS].numpy()

    return sample


def equality(name: str, episodes: int, count: int = 10) -> dict[str, Any]:
    """Plain Gymnasium environments, stepped one by one, beside native chunks with the same actions."""
    task, native = task_and_native(name)
    kept: list[Outcomes] = []

    class Recorded(native):  # type: ignore[misc, valid-type]
        def outcomes(self, actions: np.ndarray, quantities: Any) -> Outcomes:
            kept.append(super().outcomes(actions, quantities))
            return kept[-1]

    chunks = NativeChunks([task.make() for _ in range(count)], KEYS, 1, Recorded, threads=2)
    plain = [make_environment(task.simulator(), task.env_kwargs, name) for _ in range(count)]
    seed, sample = derived_seed(0, "environments"), sampler(name, chunks.action_space)
    rows = chunks.reset(0)["observation"][:, -1]
    worst = dict.fromkeys(("reward", "observation", "state"), 0.0)
    for row, env in enumerate(plain):
        env.reset(seed=seed + row)
    ended, steps, other_ends, terminations = 0, 0, 0, 0
    while ended < episodes:
        actions = chunks.envs[0].bounded(sample(rows))
        step = chunks.step(actions)
        found = kept[-1]
        for row, env in enumerate(plain):
            answer = _played(env, actions[row])
            executed = len(answer["rewards"])
            ends = (executed, answer["terminated"], answer["truncated"] and not answer["terminated"])
            other_ends += ends != (step.executed[row], step.terminated[row], step.truncated[row])
            _note(worst, "reward", answer["rewards"], found.rewards[row, :executed])
            _note(worst, "observation", answer["observations"], found.observation[row, :executed])
            steps, terminations = steps + executed, terminations + answer["terminated"]
            if answer["terminated"] or answer["truncated"]:
                ended += 1
                env.reset()
            _note(worst, "state", _state(env), _state(chunks.envs[row]))
        rows = step.observation["observation"][:, -1]
    chunks.close()
    return {
        "task": name, "episodes": ended, "steps": steps, "terminated": terminations,
        "other_ends": other_ends, "largest_difference": worst,
    }  # fmt: skip


def _played(env: Any, actions: np.ndarray) -> dict[str, Any]:
    answer: dict[str, Any] = {"rewards": [], "observations": []}
    for action in actions:
        _, reward, answer["terminated"], answer["truncated"], _ = env.step(action)
        answer["rewards"].append(float(reward))
        answer["observations"].append(env.unwrapped._get_obs())  # in float64, whatever wraps it
        if answer["terminated"] or answer["truncated"]:
            break
    return answer


def _state(env: Any) -> np.ndarray:
    data = env.unwrapped.data
    return np.concatenate([data.qpos, data.qvel, data.qacc_warmstart])


def _note(worst: dict[str, float], what: str, theirs: Any, ours: Any) -> None:
    worst[what] = max(worst[what], float(np.abs(np.asarray(theirs) - ours).max()))


class Vectorised:
    """One of Gymnasium's vector environments as chunks: ``step`` is called once for each action."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, seed: int) -> np.ndarray:
        rows: np.ndarray = self.env.reset(seed=seed)[0]
        return rows

    def step(self, chunks: np.ndarray) -> tuple[np.ndarray, int]:
        for at in range(chunks.shape[1]):
            rows = self.env.step(chunks[:, at])[0]
        return rows, chunks.shape[0] * chunks.shape[1]

    def close(self) -> None:
        self.env.close()


class Chunked:
    """Chunk environments, likewise."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def reset(self, seed: int) -> np.ndarray:
        rows: np.ndarray = self.env.reset(seed)["observation"][:, -1]
        return rows

    def step(self, chunks: np.ndarray) -> tuple[np.ndarray, int]:
        step = self.env.step(chunks)
        return step.observation["observation"][:, -1], int(step.executed.sum())

    def close(self) -> None:
        self.env.close()


def speed(name: str, rounds: int, calls: int) -> dict[str, Any]:
    """Steps per second of what simulates 16 environments; time of the policy apart."""
    task, native = task_and_native(name)
    make = task.make
    raw = partial(make_environment, task.simulator(), task.env_kwargs, name)
    makers, raws = [make] * ENVS, [raw] * ENVS

    def native_chunks(threads: int) -> Chunked:
        return Chunked(NativeChunks([make() for make in makers], KEYS, 1, native, threads=threads))

    ways: dict[str, Any] = {
        "native, 2 threads": native_chunks(2),
        "native, 1 thread": native_chunks(1),
        "WorkerChunks, 2 processes": Chunked(WorkerChunks(makers, 2, KEYS, 1)),
        "LocalChunks": Chunked(LocalChunks([make() for make in makers], KEYS, 1)),
        "SyncVectorEnv": Vectorised(gymnasium.vector.SyncVectorEnv(raws)),
        "AsyncVectorEnv": Vectorised(gymnasium.vector.AsyncVectorEnv(raws)),
    }
    if find_spec("envpool") and name in ("hopper", "walker2d", "halfcheetah", "ant", "humanoid"):
        import envpool

        version4 = task.simulator().replace("v5", "v4")  # it has no v5
        ways["envpool, 2 threads"] = Vectorised(
            envpool.make_gymnasium(version4, num_envs=ENVS, num_threads=2)
        )
    sample = sampler(name, ways["LocalChunks"].env.action_space)
    space = ways["LocalChunks"].env.action_space
    rows = {way: env.reset(0) for way, env in ways.items()}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, env in ways.items():
            seconds, computed, steps = 0.0, 0.0, 0
            for _ in range(calls):
                chunks = np.clip(sample(rows[way]), space.low, space.high).astype(np.float32)
                started, computed_before = time.perf_counter(), time.process_time()
                rows[way], executed = env.step(chunks)
                seconds += time.perf_counter() - started
                computed += time.process_time() - computed_before
                steps += executed
            rates[way].append(steps / seconds)
            cpu[way].append(1e6 * computed / steps)
    for env in ways.values():
        env.close()
    ratio = [a / b for a, b in zip(rates["native, 2 threads"], rates["SyncVectorEnv"], strict=True)]
    return {
        "task": name, "environments": ENVS, "rounds": rounds, "chunks_a_round": calls,
        "steps_per_second": {
            way: {"median": statistics.median(r), "lowest": min(r), "highest": max(r)} for way, r in rates.items()
        },
        "cpu_microseconds_a_step": {
            way: statistics.median(r) for way, r in cpu.items() if way not in OTHER_PROCESSES
        },
        "native_to_sync_median_ratio": statistics.median(ratio),
        "envpool": "measured" if "envpool, 2 threads" in ways else "not installed",
    }  # fmt: skip


def finetuning(rounds: int) -> dict[str, Any]:
    """Seconds of an iteration on Hopper, its parts, with and without native chunks."""
    task, native = task_and_native("hopper")
    makers = [task.make] * ENVS
    ways = {
        "native, 2 threads": NativeChunks([make() for make in makers], KEYS, 1, native, threads=2),
        "WorkerChunks, 2 processes": WorkerChunks(makers, 2, KEYS, 1),
    }
    models = {
        way: ReinFlow(
            FlowPolicy.load(ROOT / "benchmarks" / "checkpoints" / POLICIES["hopper"]), ChunkedVecEnv(chunks),
            num_steps=4, critic_warmup=0, seed=0,
        )
        for way, chunks in ways.items()
    }  # fmt: skip
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, model in models.items():
            before = dict(model.seconds)
            model.learn(1, reset_num_timesteps=False)  # one iteration
            seconds[way].append({part: total - before[part] for part, total in model.seconds.items()})
    weights = [model.policy.state_dict() for model in models.values()]
    same = all(torch.equal(w[key], weights[0][key]) for w in weights[1:] for key in weights[0])
    for chunks in ways.values():
        chunks.close()
    return {
        "iteration": f"{ENVS} environments x 128 chunks x {STEPS} steps, K = 4, defaults of ReinFlow",
        "rounds": rounds,
        "same_weights_at_the_end": same,
        "median_seconds": {
            way: {part: statistics.median(one[part] for one in found) for part in found[0]}
            for way, found in seconds.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("equality", "speed", "finetuning"), nargs="+")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=100, help="of each task in the part equality")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.part or ("equality", "speed", "finetuning"):
        if part == "equality":
            for name in arguments.tasks:
                row = equality(name, arguments.episodes)
                rows = {old["task"]: old for old in _content().get(part, [])} | {name: row}
                _save(part, [rows[task] for task in TASKS if task in rows])
        elif part == "speed":
            names = [name for name in ("hopper", "halfcheetah", "adroit_door") if name in arguments.tasks]
            _save(part, [speed(name, arguments.rounds, 10) for name in names])
        else:
            _save(part, finetuning(2))


def _content() -> dict[str, Any]:
    return read_json(RESULT) if RESULT.exists() else {}


def _save(part: str, found: Any) -> None:
    print(part, found, flush=True)
    about = {
        "command": "python benchmarks/native_chunks.py", "seeds": [0], "versions": versions(),
        "machine": machine(), "commit": git_state()[0],
        "load_average": {**_content().get("load_average", {}), part: os.getloadavg()[1]},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_json(RESULT, {**_content(), part: found, **about})


if __name__ == "__main__":
    main()
