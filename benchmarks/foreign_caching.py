"""Block-wise caching in Diffusion Policy's own transformer with its 100-step DDPM sampler, on Push-T.

    python benchmarks/foreign_caching.py --checkout PATH      # of real-stanford/diffusion_policy

Its model is trained here on the human demonstrations (going on where it was stopped), and is then driven by the same
scheduler as our own policies, through `flowpolicy.acceleration.caching.foreign`. Reported for every schedule: the share of
blocks recomputed, the error of the chunk against full computation with the same noises, the speed-up of a call in
eager PyTorch, and the coverage of whole episodes, paired in starts and noises. Schedules are made from observations
of the demonstrations, which no evaluation episode meets.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peers.diffusion_policy_sampler import TRAIN_STEPS, DDPMSampler, alphas_cumprod, build_model
from safetensors.torch import load_file
from torch import Tensor, nn

from flowpolicy.acceleration.caching.foreign import CachedDecoder, calibrate_decoder
from flowpolicy.acceleration.caching.schedule import Schedule, full_schedule
from flowpolicy.data.normalization import Normalizer
from flowpolicy.data.sampling import ChunkSampler, as_tensors, shuffled_index
from flowpolicy.data.store import read_demonstrations
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import Task
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import save_tensors, write_json
from flowpolicy.pretraining.ema import EMA
from flowpolicy.runs.progress import progress

ROOT = Path(__file__).resolve().parents[1]
CHUNK, OBS_STEPS, EXECUTED, ACTION, OBSERVATION = 16, 2, 8, 2, 20
METHODS = ("full", "uniform", "acs", "acs+bua", "consecutive")
SAVE_EVERY = 250


class Setting:
    """The demonstrations, normalised as the peer does: to [-1, 1]."""

    def __init__(self, store: str) -> None:
        demos = read_demonstrations(ROOT / store)
        observation = as_tensors(demos, ["observation"], "cpu")["observation"]
        action = as_tensors(demos, ["action"], "cpu")["action"]
        self.observation = Normalizer.fit(observation, "minmax")
        self.action = Normalizer.fit(action, "minmax")
        self.chunks = ChunkSampler(
            {"observation": self.observation.normalize(observation)},
            self.action.normalize(action), demos.episode_ends, OBS_STEPS, CHUNK,
        )  # fmt: skip


def train(setting: Setting, arguments: argparse.Namespace, folder: Path) -> nn.Module:
    """Noise prediction (Ho et al. 2020, equation 14) with the peer's optimiser groups; the average of the weights."""
    model = build_model(
        arguments.checkout, width=arguments.width, depth=arguments.depth, num_heads=4, horizon=CHUNK,
        action_dim=ACTION, obs_dim=OBSERVATION, obs_steps=OBS_STEPS,
    )  # fmt: skip
    torch.manual_seed(0)
    cast("Any", model).apply(cast("Any", model)._init_weights)
    average = EMA(model, 0.995)
    optimizer = cast("Any", model).configure_optimizers(
        learning_rate=arguments.learning_rate, weight_decay=1e-3, betas=(0.9, 0.95)
    )
    parameters = list(model.parameters())
    first = 0
    if (folder / "progress.json").exists():
        first = int(read_json(folder / "progress.json")["steps"])
        held = load_file(str(folder / f"training-{first}.safetensors"))
        model.load_state_dict({key[6:]: value for key, value in held.items() if key.startswith("model.")})
        average.network.load_state_dict(
            {key[8:]: value for key, value in held.items() if key.startswith("average.")}
        )
        for index, parameter in enumerate(parameters):
            if f"exp_avg.{index}" in held:
                optimizer.state[parameter] = {
                    name: held[f"{name}.{index}"] for name in ("step", "exp_avg", "exp_avg_sq")
                }
    levels = alphas_cumprod()
    model.train()
    for step in progress(range(first, arguments.train_steps), "training"):
        generator = torch.Generator().manual_seed(step)
        batch = setting.chunks.batch(shuffled_index(step, arguments.batch_size, len(setting.chunks), seed=0))
        noise = torch.randn(batch.action.shape, generator=generator)
        t = torch.randint(TRAIN_STEPS, (len(noise),), generator=generator)
        level = levels[t][:, None, None]
        noisy = level.sqrt() * batch.action + (1 - level).sqrt() * noise
        loss = (model(noisy, t, batch.observation["observation"]) - noise).square().mean()
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = (
                arguments.learning_rate * warm * 0.5 * (1 + np.cos(np.pi * step / arguments.train_steps))
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == arguments.train_steps:
            held = {f"model.{key}": value for key, value in model.state_dict().items()}
            held |= {f"average.{key}": value for key, value in average.network.state_dict().items()}
            for index, parameter in enumerate(parameters):
                for name, value in optimizer.state.get(parameter, {}).items():
                    held[f"{name}.{index}"] = value
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(held, folder / f"training-{step + 1}.safetensors")
            write_json(folder / "progress.json", {"steps": step + 1, "loss": float(loss.detach())})
            (folder / f"training-{step + 1 - SAVE_EVERY}.safetensors").unlink(missing_ok=True)
            print(f"{time.strftime('%H:%M:%S')} step {step + 1}: loss {float(loss.detach()):.4f}", flush=True)
    return copy.deepcopy(average.network).eval()


class PeerPolicy:
    """The peer's model and sampler as evaluation wants a policy; see ``flowpolicy.execution.receding_horizon.ChunkPolicy``."""

    observation_shapes: Mapping[str, tuple[int, ...]] = {"observation": (OBSERVATION,)}
    obs_horizon, action_horizon, action_dim = OBS_STEPS, CHUNK, ACTION
    device = torch.device("cpu")

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        self.decoder = CachedDecoder(
            cast("Any", model).decoder,
            num_evaluations=TRAIN_STEPS,
            chunk_shape=(CHUNK, ACTION),
            sampler="ddpm",
        )
        cast("Any", model).decoder = self.decoder
        self.sampler, self.setting = DDPMSampler(model), setting

    def nfe(self, *args: Any, **kwargs: Any) -> int:
        return TRAIN_STEPS

    def normalized(self, observation: Tensor, noise: Tensor) -> Tensor:
        """A normalised chunk; the injected noises of a row follow from its first one, in whatever batch."""
        drawn = []
        for row in noise:
            seed = int(row.contiguous().view(torch.int32).sum())
            generator = torch.Generator().manual_seed(seed % 2**31)
            drawn.append(torch.randn(TRAIN_STEPS, CHUNK, ACTION, generator=generator))
        return self.sampler(self.setting.observation.normalize(observation), noise, torch.stack(drawn, 1))

    def act(self, observations: Any, *, noise: Tensor, **settings: Any) -> Tensor:
        observation = torch.as_tensor(observations["observation"], dtype=torch.float32)
        return self.setting.action.denormalize(self.normalized(observation, noise))


def measure(
    policy: PeerPolicy, setting: Setting, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Schedules, their errors and speed-ups, and episodes."""
    known = setting.observation.denormalize(setting.chunks.observation["observation"])
    index = torch.linspace(0, len(known) - 2, 256).round().long()
    histories = torch.stack([known[index], known[index + 1]], 1)
    making, judging = histories[0::2], histories[1::4]

    def sample(observation: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return policy.normalized(
            observation, torch.randn(len(observation), CHUNK, ACTION, generator=generator)
        )

    files = {method: folder / f"schedule-{method}.json" for method in METHODS if method != "full"}
    if not all(file.exists() for file in files.values()):
        made = calibrate_decoder(
            policy.decoder,
            sample,
            making,
            updates=arguments.updates,
            bubbles=arguments.bubbles,
            noise_seeds=2,
        )
        for method, file in files.items():
            made[method].save(file)
    schedules = {"full": full_schedule(policy.decoder.key)}
    schedules |= {method: Schedule.load(file) for method, file in files.items()}
    chunks, seconds = {}, {method: [] for method in METHODS}
    for method in METHODS:
        policy.decoder.schedule = schedules[method]
        chunks[method] = sample(judging, 10_000)
    noise = torch.randn(1, CHUNK, ACTION, generator=torch.Generator().manual_seed(1))
    for turn in progress(arguments.rounds + 1, "timing"):
        for method in METHODS:
            policy.decoder.schedule = schedules[method]
            started = time.perf_counter()
            policy.normalized(judging[:1], noise)
            if turn:
                seconds[method].append(time.perf_counter() - started)
    task = Task("pusht", "flowpolicy_envs:flowpolicy/PushT-v0", {}, OBS_STEPS, CHUNK, EXECUTED, 10.0, "score")
    rows = {}
    for method in METHODS:
        policy.decoder.schedule = schedules[method]
        file = folder / f"episodes-{method}-{arguments.episodes}.json"
        if not file.exists():
            result = evaluate(cast("Any", policy), task, episodes=arguments.episodes, num_envs=25)
            assert result.score is not None
            write_json(file, {"score": result.score.tolist()})
            print(f"{time.strftime('%H:%M:%S')} {method}: {np.mean(result.score):.3f}", flush=True)
        score = np.array(read_json(file)["score"])
        full = np.array(read_json(folder / f"episodes-full-{arguments.episodes}.json")["score"])
        ratios = [a / b for a, b in zip(seconds["full"], seconds[method], strict=True)]
        rows[method] = {
            "share": schedules[method].share,
            "settings": schedules[method].settings,
            "rms_error": float((chunks[method] - chunks["full"]).square().mean().sqrt()),
            "milliseconds_p50": 1e3 * statistics.median(seconds[method]),
            "speed_up": statistics.median(ratios),
            "coverage": float(score.mean()),
            "coverage_ci95": list(mean_interval(score)),
            "difference": float((score - full).mean()),
            "difference_ci95": list(paired_difference_interval(score, full))
            if method != "full"
            else [0.0, 0.0],
        }
    return rows


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| schedule | f | rms error | ms | speed-up | coverage | to full, points |",
        "|" + " --- |" * 7,
    ]
    for method, row in content["rows"].items():
        low, high = row["coverage_ci95"]
        cells = [method, f"{row['share']:.3f}", f"{row['rms_error']:.4f}", f"{row['milliseconds_p50']:.0f}"]
        cells += [f"{row['speed_up']:.2f}x", f"{row['coverage']:.3f} [{low:.3f}, {high:.3f}]"]
        low, high = row["difference_ci95"]
        cells.append(
            ""
            if method == "full"
            else f"{100 * row['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", required=True, help="of real-stanford/diffusion_policy")
    parser.add_argument("--store", default="demonstrations/pusht.zarr.zip")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--updates", type=int, default=10, help="S")
    parser.add_argument("--bubbles", type=int, default=5, help="n")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="", help="of the run; another one writes no results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.folder) if arguments.folder else ROOT / "runs" / "benchmarks" / "foreign"
    setting = Setting(arguments.store)
    policy = PeerPolicy(train(setting, arguments, folder), setting)
    content = {
        "command": "python benchmarks/foreign_caching.py --checkout PATH",
        "peer": "real-stanford/diffusion_policy TransformerForDiffusion, 100 DDPM steps, eager",
        "settings": {
            key: value for key, value in vars(arguments).items() if key not in ("checkout", "folder")
        },
        "first_seed": EVALUATION_SEED,
        "rows": measure(policy, setting, arguments, folder),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
        "versions": versions(), "git_commit": git_state()[0],
    }  # fmt: skip
    results = folder / "report" if arguments.folder else ROOT / "benchmarks" / "results"
    write_json(results / "foreign-caching.json", content)
    print(table(content))


if __name__ == "__main__":
    main()
