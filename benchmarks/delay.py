"""What inference delay costs on Push-T, and what each way of executing chunks makes of it, resumably.

    python benchmarks/delay.py             # does what is missing, arm by arm, writes the JSON and the plot
    python benchmarks/delay.py --report    # only collects what is there

The simulation continues while a chunk is sampled, in virtual time (`flowpolicy.evaluation.delayed`): the delay is in environment
steps of 0.1 s and the same in a whole arm. All arms run one policy and meet the same environment seeds, and the same
x_0 at the same chunk of an episode, so that differences are paired. The safe action is to hold the last target.

Temporal ensembling needs chunks that overlap, so it asks for one every 2 actions where the others do so every 8; at
some delays all are run with a chunk every 4 actions as well, and naive switching with one every 2. Two chunks overlap
for T - max(T_e, d) - d ticks at delay d: not at all at d = 8, where ensembling is naive switching.

Real-time chunking comes twice: with the published guidance, which supposes that actions have a standard deviation of
1 given the observation, and with one of 0.2 (`guidance={"name": "prefix"}`, prior_std = 0.2, beta = 4 K).
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.sampler import Sampler, build_sampler
from flowpolicy.evaluation.delayed import run_delayed
from flowpolicy.evaluation.rollout import EVALUATION_SEED
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval, wilson_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.plots.figure import BLUE, GREEN, GREY, ORANGE, house_figure

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "benchmarks" / "delay"
RESULTS = ROOT / "benchmarks" / "results" / "delay-pusht.json"
CHECKPOINT = "benchmarks/checkpoints/pusht-flow_matching-seed0"

K = 5
REFERENCE_K = 16
FEWER = (2, 3, K, REFERENCE_K)  # at delay 0, to show that K is enough
DELAYS = (0, 2, 4, 6, 8)
FAIR = (2, 4)  # delays at which all strategies run with the same T_e
EXECUTE = {"ensemble": 2}
USUAL, EQUAL = 8, 4  # T_e
GUIDANCE = {"rtc": {}, "rtc-0.2": {"prior_std": 0.2, "beta": 4.0 * K}}
STRATEGIES = ("synchronous", "switch", "ensemble", *GUIDANCE)
NUM_ENVS = 50
LABELS = {
    "synchronous": "synchronous (stands still)",
    "switch": "naive switching",
    "ensemble": "temporal ensembling, T_e = 2",
    "rtc": "real-time chunking",
    "rtc-0.2": "real-time chunking, s = 0.2",
}
COLORS = {"synchronous": GREY, "switch": ORANGE, "ensemble": GREEN, "rtc": BLUE, "rtc-0.2": "#7a3e9d"}
CHANGES = ("seam_jump", "inside_jump", "seam_jerk", "inside_jerk")


@dataclass(frozen=True)
class Arm:
    """One strategy at one delay."""

    strategy: str
    delay: int
    execute_horizon: int
    num_steps: int = K

    @property
    def name(self) -> str:
        return f"{self.strategy}-d{self.delay}-Te{self.execute_horizon}-K{self.num_steps}"


def arms() -> list[Arm]:
    """All arms; what decides the most comes first."""
    main = [Arm(s, delay, EXECUTE.get(s, USUAL)) for delay in (0, 4, 8, 2, 6) for s in STRATEGIES]
    fewer = [Arm("synchronous", 0, USUAL, k) for k in FEWER]
    fair = [Arm(s, delay, EQUAL) for delay in reversed(FAIR) for s in STRATEGIES]
    often = [Arm("switch", delay, EXECUTE["ensemble"]) for delay in (0, *FAIR)]
    return list(dict.fromkeys([*fewer, *main, *fair, *often]))


def guided(policy: FlowPolicy, num_steps: int, **settings: float) -> Sampler:
    """A sampler of chunks that agree with a prefix."""
    return build_sampler(
        policy, num_steps=num_steps, backend="eager", guidance={"name": "prefix", **settings}
    )


def run(arm: Arm, episodes: int) -> dict[str, Any]:
    """The arm's episodes."""
    policy = FlowPolicy.load(ROOT / CHECKPOINT)
    guidance = GUIDANCE.get(arm.strategy)
    sampler = policy if guidance is None else guided(policy, arm.num_steps, **guidance)
    started = time.time()
    result = run_delayed(
        sampler, task_of(policy.spec.task, None, CHECKPOINT),
        strategy="rtc" if guidance is not None else arm.strategy, delay=arm.delay, safe_action="hold",
        execute_horizon=arm.execute_horizon, episodes=episodes, num_envs=NUM_ENVS, num_steps=arm.num_steps,
    )  # fmt: skip
    assert result.score is not None
    assert result.success is not None
    return {
        **asdict(arm),
        "guidance": guidance,
        "episodes": episodes,
        "first_seed": EVALUATION_SEED,
        "score": result.score.tolist(),
        "success": result.success.tolist(),
        "length": result.lengths.tolist(),
        **asdict(result.smoothness),
        "chunks": result.chunks,
        "safe_ticks": result.safe_ticks,
        "simulation_seconds": result.simulation_seconds,
        "inference_seconds": result.inference_seconds,
        "wall_seconds": time.time() - started,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_state()[0],
    }


def chunk_milliseconds(calls: int = 60) -> dict[str, float]:
    """Median time of a chunk sampled alone, freely and in agreement with a prefix, taking turns; eager, one thread."""
    policy = FlowPolicy.load(ROOT / CHECKPOINT)
    sampler = guided(policy, K)
    shape = (1, policy.spec.action_horizon, policy.spec.action_dim)
    observation = {
        key: np.zeros((1, policy.spec.obs_horizon, *s)) for key, s in policy.spec.observation_shapes.items()
    }
    prefix = (np.zeros(shape), np.ones(shape[:2]))
    times: dict[str, list[float]] = {"free": [], "guided": []}
    for _ in range(calls + 5):
        for name, given in (("free", None), ("guided", prefix)):
            started = time.perf_counter()
            sampler.act(observation, noise=torch.zeros(shape), prefix=given)
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: float(np.median(values[5:])) for name, values in times.items()}


def collect() -> dict[str, Any]:
    """All arms, each with its paired differences to naive switching at its delay.

    An arm whose episodes are not on this machine keeps the row it has, with the date and commit of that.
    """
    found = {arm: read_json(path) for arm in arms() if (path := FOLDER / f"{arm.name}.json").exists()}
    before = {_arm_of(row): row for row in read_json(RESULTS)["rows"]} if RESULTS.exists() else {}
    rows = [before[arm] for arm in arms() if arm in before and arm not in found]
    for arm, content in found.items():
        score, success = np.array(content["score"]), int(np.sum(content["success"]))
        usual, same = (
            Arm("switch", arm.delay, every, arm.num_steps) for every in (USUAL, arm.execute_horizon)
        )
        reference = Arm(arm.strategy, arm.delay, arm.execute_horizon, REFERENCE_K)
        about = ("episodes", *CHANGES, "chunks", "safe_ticks", "wall_seconds", "date", "git_commit")
        rows.append({
            **asdict(arm),
            "coverage": float(score.mean()),
            "coverage_ci95": list(mean_interval(score)),
            "success": success / len(score),
            "success_ci95": list(wilson_interval(success, len(score))),
            "length": float(np.mean(content["length"])),
            "difference_to_switch": _difference(content, found.get(usual)) if arm != usual else None,
            "difference_to_switch_of_same_T_e": _difference(content, found.get(same)) if arm != same else None,
            "difference_to_reference_K": _difference(content, found.get(reference)) if arm != reference else None,
            **{key: content[key] for key in about},
        })  # fmt: skip
    return {
        "command": "python benchmarks/delay.py",
        "checkpoint": CHECKPOINT,
        "protocol": {
            "K": K,
            "coverage": "largest coverage of the goal in an episode over 0.95, at most 1 (the published score)",
            "episodes": f"environment seeds and seeds of x_0 from {EVALUATION_SEED}, the same in every arm",
            "delay": "environment steps of 0.1 s, fixed in an arm",
            "safe_action": "hold the last target; the episode begins with its first chunk",
            "smoothness": "root mean square over dimensions, in action ranges (512 px); jerk per s^3, dt 0.1 s",
            "guidance": GUIDANCE,
        },
        "rows": rows,
        "milliseconds_a_chunk": {**chunk_milliseconds(), "load": os.getloadavg()[0]},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_state()[0],
    }


def _arm_of(row: dict[str, Any]) -> Arm:
    return Arm(row["strategy"], row["delay"], row["execute_horizon"], row["num_steps"])


def _difference(first: dict[str, Any], second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Mean of first - second in coverage and success, over the episodes that both have."""
    if second is None:
        return None
    both = min(first["episodes"], second["episodes"])
    result: dict[str, Any] = {"episodes": both}
    for key, name in (("score", "coverage"), ("success", "success")):
        mine, other = (np.asarray(arm[key][:both], dtype=np.float64) for arm in (first, second))
        result[name] = float((mine - other).mean())
        result[f"{name}_ci95"] = list(paired_difference_interval(mine, other))
    return result


def table(content: dict[str, Any]) -> str:
    """Markdown: every arm."""
    head = "strategy | delay | T_e | K | coverage | to switching, T_e = 8, points | of the same T_e | success | seam jump (inside), % | seam jerk (inside), 1/s^3 | held"
    lines = [f"| {head} |", "|" + " --- |" * 11]
    order = {name: index for index, name in enumerate(STRATEGIES)}
    for row in sorted(
        content["rows"], key=lambda r: (r["num_steps"], r["execute_horizon"] == EQUAL, r["delay"], order[r["strategy"]])
    ):  # fmt: skip
        cells = [row["strategy"], str(row["delay"]), str(row["execute_horizon"]), str(row["num_steps"])]
        cells += [_span(row["coverage"], row["coverage_ci95"])]
        for change in (row["difference_to_switch"], row["difference_to_switch_of_same_T_e"]):
            cells.append("" if change is None else _points(change["coverage"], change["coverage_ci95"]))
        cells += [_span(row["success"], row["success_ci95"])]
        for kind, scale, digits in (("jump", 100, 2), ("jerk", 1, 0)):
            places = [row[f"{place}_{kind}"] for place in ("seam", "inside")]
            said = ["-" if p["count"] == 0 else f"{scale * p['mean']:.{digits}f}" for p in places]
            cells.append(f"{said[0]} ({said[1]})")
        cells.append(f"{row['safe_ticks'] / (row['episodes'] * row['length']):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for row in content["rows"]:
        if (other := row["difference_to_reference_K"]) is not None:
            said = _points(other["coverage"], other["coverage_ci95"])
            lines.append(
                f"K = {row['num_steps']} less K = {REFERENCE_K}, no delay: {said} points of coverage."
            )
    times = content["milliseconds_a_chunk"]
    lines.append(
        f"A chunk alone, eager: {times['free']:.1f} ms, {times['guided']:.1f} ms with a prefix (load {times['load']:.1f})."
    )
    return "\n".join(lines)


def _span(mean: float, interval: list[float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _points(mean: float, interval: list[float]) -> str:
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (mean, *interval))  # + 0.0: no -0.0
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def plot(content: dict[str, Any], path: Path) -> None:
    """Coverage, success, seam jump and seam jerk against the delay, a line for each strategy."""
    panels = (
        ("coverage", "coverage", 1.0),
        ("success", "success rate", 1.0),
        ("seam_jump", "mean jump at a seam, % of the range", 100.0),
        ("seam_jerk", "mean jerk at a seam, ranges / s³", 1.0),
    )
    with house_figure(path, columns=2, rows=2, width=9.6, height=7.6) as (figure, axes):
        for axis, (key, label, scale) in zip(axes, panels, strict=True):
            for index, strategy in enumerate(STRATEGIES):
                rows = sorted(
                    (
                        row for row in content["rows"]
                        if (row["strategy"], row["num_steps"]) == (strategy, K)
                        and row["execute_horizon"] == EXECUTE.get(strategy, USUAL)
                    ),
                    key=lambda row: row["delay"],
                )  # fmt: skip
                if not rows:
                    continue
                shift = 0.08 * (index - 2)  # so that intervals do not cover each other
                delays = np.array([row["delay"] for row in rows]) + shift
                style = {"color": COLORS[strategy], "label": LABELS[strategy], "ms": 4, "lw": 1.3}
                if key in ("coverage", "success"):
                    values = np.array([row[key] for row in rows])
                    ends = np.array([row[f"{key}_ci95"] for row in rows])
                    axis.errorbar(delays, values, yerr=np.abs(ends - values[:, None]).T, fmt="o-", elinewidth=0.8, **style)  # fmt: skip
                else:
                    axis.plot(delays, [scale * row[key]["mean"] for row in rows], "o-", **style)
            axis.set_xlabel("delay, environment steps of 0.1 s")
            axis.set_ylabel(label)
            axis.set_xticks(DELAYS)
            if key not in ("coverage", "success"):
                axis.set_ylim(bottom=0)
                found = [row[key.replace("seam", "inside")]["mean"] for row in content["rows"]]
                inside = [value for value in found if value is not None]  # none where T_e = 2
                axis.axhline(
                    scale * float(np.median(inside)), color=GREY, ls=":", lw=1, label="inside chunks"
                )
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--only", default="", help="only arms whose name contains this text")
    parser.add_argument("--report", action="store_true", help="collect what is there, run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for arm in arms() if not arguments.report else []:
        path = FOLDER / f"{arm.name}.json"
        if not path.exists() and arguments.only in arm.name:
            content = run(arm, arguments.episodes)
            write_json(path, content)
            print(
                f"{time.strftime('%H:%M:%S')} {arm.name}: coverage {np.mean(content['score']):.3f}, "
                f"{content['wall_seconds']:.0f} s",
                flush=True,
            )
    content = collect()
    write_json(RESULTS, content)
    plot(content, ROOT / "docs" / "images" / "delay-pusht.png")
    print(table(content))


if __name__ == "__main__":
    main()
