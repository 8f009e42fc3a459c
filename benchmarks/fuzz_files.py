"""Files of ours as a stranger may have damaged them: each is refused in one sentence, or what it describes works.

python benchmarks/fuzz_files.py --files 500 --seed 0 --output benchmarks/results/fuzz-files.json
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from file_mutations import ARCHIVE, BYTES, JSON, TENSORS, Damage, odd_file

from flowpolicy import FlowPolicy, PolicyConfig
from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, MeasuredSampler, fingerprint, hardware
from flowpolicy.acceleration.deployed import only
from flowpolicy.acceleration.sampler import accelerate, build_sampler
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import Task, task_of
from flowpolicy.features.vision.config import VisionConfig
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.config import TransformerConfig
from flowpolicy.pretraining.state import TrainingState
from flowpolicy.runs.device import resolve_device
from flowpolicy.runs.run_folder import refuse_other_settings

LONGEST_S, MOST_MB, LIBRARIES_MB = 2.0, 600.0, 250.0
"""Within which a file must be answered, and memory of the process that does it, the packages included."""
SETTINGS = {"seed": 0, "train": {"steps": 10, "learning_rate": 1e-3}, "data": {"keys": ["observation"]}}


@dataclass(frozen=True)
class Answer:
    """What came of one damaged file.

    Attributes:
        file: which one.
        damage: its kind.
        index: of the case.
        outcome: refused, loaded or failed.
        sentence: of the refusal, or what failed.
        seconds: until then, by the clock.
        cpu_seconds: of them, those that were computed.
        megabytes: peak of the process, with all that was there before.
        grown_megabytes: peak above what was there before.
    """

    file: str
    damage: str
    index: int
    outcome: str
    sentence: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    megabytes: float = 0.0
    grown_megabytes: float = 0.0

    @property
    def is_good(self) -> bool:
        is_small = self.grown_megabytes < MOST_MB - LIBRARIES_MB
        return self.outcome != "failed" and self.cpu_seconds < LONGEST_S and is_small


# Valid files, and what is done with them ----------------------------------------------------------------------------


def make_policy(
    objective: str = "shortcut", shapes: Mapping[str, tuple[int, ...]] | None = None
) -> FlowPolicy:
    torch.manual_seed(0)
    task = Task(
        "hopper", "Hopper-v5", {"max_episode_steps": 100, "reset_noise_scale": 0.01}, safe_action="zero"
    )
    config = PolicyConfig(
        objective={"name": objective, "default_num_steps": 2},
        model=TransformerConfig(width=16, depth=1, num_heads=2, vision=VisionConfig(channels=16, keypoints=2)),
        observations=dict(shapes or {"observation": (3,)}), action_dim=2, obs_horizon=1,
        action_horizon=4, execute_horizon=2, task=asdict(task), metadata={"steps": 10, "demo_return_mean": 3.5},
    )  # fmt: skip
    policy = FlowPolicy(config)
    vectors = {
        key: torch.randn(50, *feature.shape)
        for key, feature in config.observations.items()
        if len(feature.shape) == 1
    }
    policy.fit_normalizers(vectors, torch.rand(50, 2))
    return policy.eval()


def use_policy(policy: Any) -> None:
    """Plan a chunk from zeros, which must be finite and within the policy's bounds."""
    shapes = policy.spec.observation_shapes
    observation = {
        key: torch.zeros(
            1, policy.spec.obs_horizon, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32
        )
        for key, shape in shapes.items()
    }
    chunk = policy.act(observation, generator=torch.Generator().manual_seed(0))
    assert chunk.shape == (1, policy.spec.action_horizon, policy.spec.action_dim)
    assert torch.isfinite(chunk).all()
    if isinstance(policy, FlowPolicy):
        assert 1 <= policy.spec.execute_horizon <= policy.spec.action_horizon
        normalizer, clip = policy.action_normalizer, policy.config.action_clip
        reach = clip * normalizer.scale + 1e-3 * (1 + normalizer.center.abs() + clip * normalizer.scale)
        assert ((chunk - normalizer.center).abs() <= reach).all()


def use_checkpoint(folder: Path) -> None:
    policy = FlowPolicy.load(folder / "checkpoint")
    use_policy(policy)
    if policy.spec.task:
        task_of(policy.spec.task, None, folder)


def _trained() -> TrainingState:
    torch.manual_seed(0)
    network = make_policy().network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    return TrainingState(network, copy.deepcopy(network), optimizer, 1)


def _one_step(state: TrainingState) -> None:
    for parameter in state.network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()


def use_state(folder: Path) -> None:
    state = _trained()
    state.load(folder, SETTINGS)
    assert state.step >= 0
    _one_step(state)


def use_schedule(folder: Path) -> None:
    policy = make_policy()
    schedule = Schedule.load(folder / "schedule.json")
    use_policy(accelerate(policy, schedule))


def use_plan(folder: Path) -> None:
    policy = make_policy()
    plan = DeploymentPlan.load(folder / "plan.json")
    assert np.isfinite([plan.period_ms, plan.quantile, plan.max_action_error]).all()
    plan.check(policy)
    settings = plan.deployed("checkpoint")
    resolve_device(settings.device)
    use_policy(build_sampler(policy, only(settings, SamplerSpec), backend="eager"))


def use_archive(folder: Path) -> None:
    from flowpolicy.finetuning.reinflow import ReinFlow

    model = ReinFlow.load(folder / "model.zip", device="cpu")
    actions, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    assert np.isfinite(actions).all()


def use_actor(folder: Path) -> None:
    from flowpolicy_envs.actor import ExpertActor

    actor = ExpertActor.load(folder / "actor.safetensors")
    action = actor.act(np.zeros((1, 3), np.float32), np.random.default_rng(0))
    assert np.isfinite(action).all()


def use_run(folder: Path) -> None:
    refuse_other_settings(folder, read_json(folder / "config.json"), SETTINGS)


def write_all(folder: Path) -> None:
    """One valid file of each kind."""
    from flowpolicy.finetuning.reinflow import ReinFlow
    from flowpolicy_envs.actor import ActorInfo, ExpertActor

    policy = make_policy()
    policy.save(folder / "vectors" / "checkpoint")
    shapes = {"image": (36, 36, 3), "state": (3,)}
    make_policy("flow_matching", shapes).save(folder / "images" / "checkpoint")
    state = _trained()
    _one_step(state)
    state.save(folder / "state", SETTINGS)
    schedule = full_schedule(ScheduleKey.of(policy, SamplerSpec(num_steps=4)))
    (folder / "schedule").mkdir()
    schedule.save(folder / "schedule" / "schedule.json")
    (folder / "plan").mkdir()
    schedule.save(folder / "plan" / "cached.json")
    sampling = SamplerSpec(num_steps=4, solver="euler", backend="eager", schedule="cached.json")
    chosen = MeasuredSampler(sampling, 1.0, 4, {"p50": 1.0, "bound": 2.0}, 0.01)
    DeploymentPlan(
        fingerprint(policy), hardware(1), 20.0, 0.99, 0.1, chosen, None, "cpu", 1, 2, {"return": 3.0}, "A reason.",
    ).save(folder / "plan" / "plan.json")  # fmt: skip
    (folder / "archive").mkdir()
    ReinFlow(policy, None, num_steps=2, critic_hidden=(16,), device="cpu").save(
        folder / "archive" / "model.zip"
    )
    info = ActorInfo("Hopper-v5", "sac", 10, 0, 1.0, 0.5, "command", {"torch": "2"})
    sizes = {
        "hidden0.weight": (8, 3),
        "hidden0.bias": (8,),
        "mean.weight": (2, 8),
        "mean.bias": (2,),
        "log_std": (2,),
    }
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors |= {"obs_mean": torch.zeros(3), "obs_std": torch.ones(3)}
    (folder / "actor").mkdir()
    ExpertActor(tensors, "tanh", "clip", info).save(folder / "actor" / "actor.safetensors")
    write_json(folder / "run" / "config.json", SETTINGS)


Use = Callable[[Path], None]
KINDS: dict[str, tuple[str, Damage, Use]] = {
    "vectors/checkpoint/config.json": ("json", JSON, use_checkpoint),
    "vectors/checkpoint/model.safetensors": ("tensors", TENSORS, use_checkpoint),
    "images/checkpoint/config.json": ("json", JSON, use_checkpoint),
    "images/checkpoint/model.safetensors": ("tensors", TENSORS, use_checkpoint),
    "state/training_state/state.json": ("json", JSON, use_state),
    "state/training_state/state.safetensors": ("tensors", TENSORS, use_state),
    "schedule/schedule.json": ("json", JSON, use_schedule),
    "plan/plan.json": ("json", JSON, use_plan),
    "archive/model.zip": ("archive", ARCHIVE, use_archive),
    "actor/actor.safetensors": ("tensors", TENSORS, use_actor),
    "run/config.json": ("json", JSON, use_run),
}
"""File -> name of the damage that knows its format, that damage, and what is done with the file."""


# One case -----------------------------------------------------------------------------------------------------------


def answer_of(folder: Path, name: str, use: Use, damage: str, index: int) -> Answer:
    """Do with the files of ``folder`` what one does with them, and judge the answer."""
    top = folder / name.partition("/")[0]
    _reset_peak()
    outcome, sentence, before = "loaded", "", _megabytes("VmRSS")
    started, computed = time.perf_counter(), time.process_time()
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(20)
    try:
        use(top)
    except FlowPolicyError as error:
        sentence = str(error)
        is_one = "\n" not in sentence and sentence[-1:] in (".", "?") and 10 < len(sentence) < 600
        outcome = "refused" if is_one and sentence.isprintable() else "failed"
    except BaseException as error:  # whatever comes: that is what is looked for
        outcome, sentence = "failed", f"{type(error).__name__}: {error}"[:600]
    finally:
        signal.alarm(0)
    taken, peak = (time.perf_counter() - started, time.process_time() - computed), _megabytes("VmHWM")
    return Answer(name, damage, index, outcome, sentence, *taken, peak, peak - before)


def run_case(valid: Path, index: int, seed: int) -> Answer:
    """Damage a copy of one valid file, drawn from ``seed`` and ``index``, and use it."""
    rng = np.random.default_rng([seed, index])
    names = sorted(KINDS)
    name = names[index % len(names)]
    label, damage, use = KINDS[name]
    kind = rng.random()
    if kind < 0.1:
        label, damage = "file", odd_file
    elif kind < 0.3:
        label, damage = "bytes", BYTES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        top = name.partition("/")[0]
        shutil.copytree(valid / top, folder / top)
        damage(folder / name, rng)
        return answer_of(folder, name, use, label, index)


def _give_up(*_: Any) -> None:
    raise TimeoutError("no answer in 20 s")


def _reset_peak() -> None:
    if sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5")


def _megabytes(entry: str) -> float:
    if not sys.platform.startswith("linux"):
        return 0.0
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(lines[entry].split()[0]) / 1024


# All of them --------------------------------------------------------------------------------------------------------


def use_valid(valid: Path) -> None:
    """Valid files are usable; and what is imported on the way belongs to no case."""
    torch.set_num_threads(1)
    for name, (_, _, use) in KINDS.items():
        use(valid / name.partition("/")[0])


def run_cases(valid: Path, count: int, seed: int) -> list[Answer]:
    """Each in a process that a crash does not take along."""
    found: list[Answer] = []
    context = multiprocessing.get_context("spawn")
    while len(found) < count:
        with ProcessPoolExecutor(1, mp_context=context, initializer=use_valid, initargs=(valid,)) as pool:
            try:
                for index in range(len(found), count):
                    found.append(pool.submit(run_case, valid, index, seed).result())
            except BrokenProcessPool:
                index = len(found)
                name = sorted(KINDS)[index % len(KINDS)]
                found.append(Answer(name, "", index, "failed", "the process died"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fuzz-files.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        found = run_cases(Path(temporary), arguments.files, arguments.seed)
    bad = [answer for answer in found if not answer.is_good]
    rows = {
        name: dict(Counter(answer.outcome for answer in found if answer.file == name))
        for name in sorted(KINDS)
    }
    print("| file | refused | loaded | failed |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {row.get('refused', 0)} | {row.get('loaded', 0)} | {row.get('failed', 0)} |")
    content = {
        "command": " ".join(["python", "benchmarks/fuzz_files.py", *sys.argv[1:]]), "seed": arguments.seed,
        "files": len(found), "outcomes": dict(Counter(answer.outcome for answer in found)), "by_file": rows,
        "longest_s": max(answer.seconds for answer in found),
        "longest_cpu_s": max(answer.cpu_seconds for answer in found),
        "most_megabytes": max(answer.megabytes for answer in found),
        "bad": [asdict(answer) for answer in bad], "machine": machine(), "versions": versions(), "git_commit": git_state()[0],
    }  # fmt: skip
    write_json(arguments.output, content)
    for answer in bad:
        print(json.dumps(asdict(answer)))
    print(f"longest {content['longest_s']:.2f} s, most {content['most_megabytes']:.0f} MB, {len(bad)} bad")
    print(arguments.output)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
