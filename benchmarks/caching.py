"""What caching blocks is worth on Push-T: coverage and success against measured latency, resumably.

    python benchmarks/caching.py             # does what is missing, arm by arm, writes the JSON and the plot
    python benchmarks/caching.py --report    # only collects what is there

The policies are the deep ones of `benchmarks/imitation.py pusht-deep`. Every arm is one policy, one K and one cache
schedule. Its episodes are run once, whatever the backend: backends agree to 1e-4 of a normalised action. All arms meet
the same environment seeds, and the same x_0 at the same request of an episode, in the order of the seeds: an arm of fewer
episodes is paired with the first of a longer one. Schedules are made from other episodes and other noises. Latencies
are those of a batch of 1 on the same machine, the samplers of a backend taking turns.

A cached schedule is set against the full computation, and against plain sampling with fewer steps: the K whose
measured latency is nearest to the schedule's own, at most 5% above it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.caching.calibration import CalibrationConfig, caching_schedules, calibrate
from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.caching.search import ActionError
from flowpolicy.acceleration.latency import LatencyConfig, benchmark_checkpoint
from flowpolicy.acceleration.observations import CALIBRATION_SEED, observations_of
from flowpolicy.acceleration.sampler import build_sampler
from flowpolicy.errors import BackendError, ConfigError
from flowpolicy.evaluation.rollout import EVALUATION_SEED, evaluate
from flowpolicy.evaluation.statistics import mean_interval, paired_difference_interval, wilson_interval
from flowpolicy.evaluation.summary import git_state, machine, versions
from flowpolicy.evaluation.task import task_of
from flowpolicy.files.reading import read_json
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.plots.caching import plot_schedules
from flowpolicy.plots.figure import BLUE, GREEN, GREY, ORANGE, house_figure

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "benchmarks"
TRAINED = "runs/benchmarks/imitation/pusht/{}-deep-seed0/train/checkpoint"

BACKENDS = ("onnx", "eager", "compile")
METHODS = ("acs", "acs+bua5", "acs+bua3", "searched", "uniform")  # the number is n, blocks given a union
FEWER_METHODS = tuple(method for method in METHODS if method != "acs+bua3")
UPDATES = 10  # S
PLAIN = {"flow_matching": (100, 50, 10, 4), "shortcut": (64, 16, 4, 1)}
FEWER = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32)  # timed beside schedules
ABOVE = 1.05  # latency of fewer steps over that of the schedule, at most
DECIDING = (  # arms of twice as many episodes: the schedules that may keep the coverage, and what they are set against
    "flow_matching-K100-full", "flow_matching-K100-searched", "flow_matching-K100-uniform",
    "flow_matching-K10-full", "flow_matching-K12-full", "flow_matching-K20-full",
)  # fmt: skip
MARGIN = -0.03  # of coverage: the lower bound that a schedule must keep
ROWS = 25  # rows of the evaluation's sampler
NUM_ENVS = 50
CALLS = {"onnx": 200, "eager": 80, "compile": 80}  # timed calls of each sampler


@dataclass(frozen=True)
class Group:
    """Schedules of one policy at one K, and the plain samplers they are compared with."""

    policy: str
    num_steps: int
    methods: tuple[str, ...] = ()
    share: float = 1.0  # of the episodes

    @property
    def name(self) -> str:
        return f"{self.policy}-K{self.num_steps}"

    def arm(self, method: str) -> str:
        return f"episodes-{self.name}-{method}"


# With K <= S there is nothing to reuse: K = 10, 4 and 1 have no schedules.
GROUPS = (
    Group("flow_matching", 100, METHODS),
    Group("flow_matching", 50, FEWER_METHODS, 1 / 3),
    Group("shortcut", 64, FEWER_METHODS, 1 / 3),
    Group("shortcut", 16, FEWER_METHODS, 1 / 3),
)


def plain(policy: str, num_steps: int) -> Group:
    """The group of a plain sampler: one of those with schedules, or one of its own."""
    return next(
        (g for g in GROUPS if (g.policy, g.num_steps) == (policy, num_steps)), Group(policy, num_steps)
    )


class Study:
    """The arms and their files; what a file holds is never computed again."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = Path(arguments.folder) if arguments.folder else RUNS / "caching"
        self.paths = {
            "flow_matching": arguments.checkpoint or TRAINED.format("flow_matching"),
            "shortcut": arguments.shortcut or TRAINED.format("shortcut"),
        }
        self.episodes, self.threads = int(arguments.episodes), int(arguments.threads)
        self.only, self.idle = str(arguments.only), bool(arguments.report)
        self.iterations, self.calls = int(arguments.search_iterations), arguments.calls

    @cached_property
    def policies(self) -> dict[str, FlowPolicy]:
        return {name: FlowPolicy.load(ROOT / path) for name, path in self.paths.items()}

    def once(self, name: str, make: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """What ``make`` gave, now or before; None where it is missing and not to be made."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            if self.idle or self.only not in name:
                return None
            started = time.time()
            made = make()
            if made is None:
                return None
            made |= {"wall_seconds": time.time() - started, "versions": versions(), "machine": machine()}
            made |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": git_state()[0]}
            write_json(path, made)
            print(f"{time.strftime('%H:%M:%S')} {name}: {made['wall_seconds']:.0f} s", flush=True)
        found = read_json(path)
        return found

    def schedules(self, group: Group) -> dict[str, Schedule]:
        """The group's schedules, made where they are missing."""
        folder = self.folder / f"schedules-{group.name}"
        if self.once(f"calibration-{group.name}", lambda: self._calibrate(group, folder)) is None:
            return {}
        return {method: Schedule.load(folder / f"{method}.json") for method in group.methods}

    def _calibrate(self, group: Group, folder: Path) -> dict[str, Any]:
        policy = self.policies[group.policy]
        config = CalibrationConfig(
            self.paths[group.policy], group.num_steps, updates=UPDATES, search_iterations=self.iterations
        )
        task = task_of(policy.spec.task, None, config.checkpoint)
        making = observations_of(
            policy, task, config.observations, episodes=config.episodes, seed=config.seed
        )
        judging = observations_of(
            policy,
            task,
            config.test_observations,
            episodes=config.episodes,
            seed=config.seed + config.episodes,
        )
        found = calibrate(policy, making, judging, config)
        schedules = {"acs+bua5" if name == "acs+bua" else name: s for name, s in found.schedules.items()}
        plain = schedules["acs"]
        three = caching_schedules(plain.key, found.similarity, UPDATES, 3, plain.calibration)["acs+bua"]
        rms, largest = ActionError(policy, judging, plain, config.seed + 1).both(three.updates)
        three.calibration.update(rms_error=rms, max_error=largest)
        schedules["acs+bua3"] = three
        for method in group.methods:
            schedules[method].save(folder / f"{method}.json")
        print(found.table())
        return {
            "method_of_least_error": min(
                group.methods, key=lambda name: schedules[name].calibration["rms_error"]
            ),
            "fewer_steps_rms_error": found.fewer_steps,
            "first_seed": CALIBRATION_SEED,
            "schedules": {
                name: {
                    "share": s.share,
                    "method": s.method,
                    "settings": s.settings,
                    "calibration": s.calibration,
                }
                for name, s in schedules.items()
            },
        }

    def rollouts(self, group: Group, method: str, schedule: Schedule | None = None) -> None:
        """The episodes of an arm; one that has too few goes on with the next seeds."""
        wanted = round(self.episodes * group.share) * (2 if f"{group.name}-{method}" in DECIDING else 1)
        name = group.arm(method)
        found = self.once(name, lambda: self._episodes(group, method, schedule, 0, wanted))
        if found is not None and found["episodes"] < wanted and not self.idle and self.only in name:
            more = self._episodes(group, method, schedule, found["episodes"], wanted - found["episodes"])
            for key in ("score", "success", "return", "length"):
                found[key] = [*found[key], *more[key]]
            found |= {"episodes": wanted, "parity": max(found["parity"], more["parity"])}
            write_json(self.folder / f"{name}.json", found)
            print(f"{time.strftime('%H:%M:%S')} {name}: now {wanted} episodes", flush=True)

    def _episodes(
        self, group: Group, method: str, schedule: Schedule | None, first: int, count: int
    ) -> dict[str, Any]:
        policy = self.policies[group.policy]
        sampler = build_sampler(
            policy, batch_size=ROWS, num_steps=group.num_steps, schedule=schedule, backend="onnx"
        )
        task = task_of(policy.spec.task, None, self.paths[group.policy])
        result = evaluate(
            cast("Any", sampler), task, episodes=count, seed=EVALUATION_SEED + first, num_envs=NUM_ENVS,
            show_progress=False,
        )  # fmt: skip
        assert result.score is not None
        assert result.success is not None
        return {
            "policy": group.policy,
            "num_steps": group.num_steps,
            "method": method,
            "share": sampler.schedule.share,
            "settings": sampler.schedule.settings,
            "parity": cast("Any", sampler.compute).parity,
            "episodes": count,
            "first_seed": EVALUATION_SEED + first,
            "score": result.score.tolist(),
            "success": result.success.tolist(),
            "return": result.returns.tolist(),
            "length": result.lengths.tolist(),
        }

    def latency(self, group: Group, backend: str) -> dict[str, Any] | None:
        """``full``, ``K<n>`` and the methods to their times in a backend."""

        def make() -> dict[str, Any] | None:
            policy = self.policies[group.policy]
            steps = [group.num_steps, *(k for k in self._fewer(policy, group) if k < group.num_steps)]
            methods = list(self.schedules(group))
            if not methods:
                return None
            files = tuple(str(self.folder / f"schedules-{group.name}" / f"{m}.json") for m in methods)
            config = LatencyConfig(
                str(ROOT / self.paths[group.policy]), tuple(steps), backends=(backend,), schedules=files,
                calls=self.calls or CALLS[backend], warm_up=5, round_calls=5, observations=32,
                device="cpu", threads=self.threads,
            )  # fmt: skip
            load = os.getloadavg()[0]
            try:
                report = benchmark_checkpoint(config)
            except BackendError as error:
                print(f"{backend}: not measured ({error})", flush=True)
                return None
            content = report.content()
            names = ["full", *(f"K{k}" for k in steps[1:]), *methods]
            rows = dict(zip(names, content.pop("rows"), strict=True))
            return {**content, "load_before": load, "calls": config.calls, "rows": rows}

        return self.once(f"latency-{group.name}-{backend}", make)

    @staticmethod
    def _fewer(policy: FlowPolicy, group: Group) -> Iterator[int]:
        for k in sorted({*FEWER, *PLAIN[group.policy]}):
            try:
                policy.checked(SamplerSpec(num_steps=k))
            except ConfigError:
                continue
            yield k

    def fewer_steps(self, group: Group, backend: str) -> None:
        """Episodes of the plain samplers that are as fast as the group's schedules."""
        timed = self.latency(group, backend)
        for method in group.methods if timed else ():
            assert timed is not None
            self.rollouts(plain(group.policy, equal_latency(timed["rows"], method)["num_steps"]), "full")

    def run(self) -> None:
        """Everything; what decides the most comes first."""
        first = GROUPS[0]
        self._episodes_of(first)
        self.latency(first, "onnx")
        self.fewer_steps(first, "onnx")
        self.collect()
        for policy, counts in PLAIN.items():
            for k in counts:
                self.rollouts(plain(policy, k), "full")
        for group in GROUPS:
            self._episodes_of(group)
            for backend in BACKENDS:
                self.latency(group, backend)
                self.fewer_steps(group, backend)
            self.collect()

    def _episodes_of(self, group: Group) -> None:
        schedules = self.schedules(group)
        self.rollouts(group, "full")
        for method, schedule in schedules.items():
            self.rollouts(group, method, schedule)

    def collect(self) -> dict[str, Any]:
        """All arms that are there."""
        idle, self.idle = self.idle, True
        arms: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("episodes-*.json")):
            arms[path.stem] = self.once(path.stem, lambda: None) or {}
        found: dict[str, Any] = {
            "command": "python benchmarks/caching.py",
            "checkpoints": self.paths,
            "episodes": self.episodes,
            "protocol": {
                "coverage": "largest coverage of the goal in an episode over 0.95, at most 1 (the published score)",
                "episodes": f"environment seeds and seeds of x_0 from {EVALUATION_SEED}, the same in every arm",
                "calibration": f"environment seeds and noise seeds from {CALIBRATION_SEED}",
                "episodes_run_with": f"backend onnx, {ROWS} rows at once, once for all backends",
                "latency": f"batch 1, {self.threads} thread, samplers of one policy and backend taking turns",
                "updates_S": UPDATES,
            },
            "arms": [_arm_row(arm, arms) for arm in arms.values()],
            "groups": [self._group(group, arms) for group in GROUPS],
        }
        found["parity"] = max((arm["parity"] for arm in arms.values()), default=None)
        found["bar"] = bar(found["groups"][0])
        found |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        found |= {"versions": versions(), "git_commit": git_state()[0]}
        self.idle = idle
        return found

    def _group(self, group: Group, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Latencies by backend, and each schedule against full computation and fewer steps."""
        calibration = self.once(f"calibration-{group.name}", lambda: None)
        backends: dict[str, Any] = {}
        for backend in BACKENDS:
            timed = self.latency(group, backend)
            if timed is None:
                continue
            full, cached = timed["rows"]["full"]["milliseconds"]["p50"], {}
            for method in group.methods:
                equal = equal_latency(timed["rows"], method)
                other = arms.get(Group(group.policy, equal["num_steps"]).arm("full"))
                mine = arms.get(group.arm(method))
                cached[method] = {
                    "share": timed["rows"][method]["share"],
                    "speed_up": full / timed["rows"][method]["milliseconds"]["p50"],
                    "fewer_steps": {**equal, "difference": _difference(mine, other)},
                }
            backends[backend] = {
                "calls": timed["calls"],
                "load_before": timed["load_before"],
                "rows": timed["rows"],
                "schedules": cached,
            }
        return {
            "policy": group.policy,
            "num_steps": group.num_steps,
            "method_of_least_calibration_error": (calibration or {}).get("method_of_least_error"),
            "calibration": (calibration or {}).get("schedules"),
            "against_full": {
                method: _difference(arms.get(group.arm(method)), arms.get(group.arm("full")))
                for method in group.methods
            },
            "backends": backends,
        }


def equal_latency(rows: dict[str, Any], method: str) -> dict[str, Any]:
    """The timed K that is as fast as a schedule; ``interpolated`` is the K of exactly its latency."""
    target = rows[method]["milliseconds"]["p50"]
    times = {row["num_steps"]: row["milliseconds"]["p50"] for row in rows.values() if row["method"] == "full"}
    allowed = [k for k, value in times.items() if value <= ABOVE * target] or [min(times)]
    chosen = min(allowed, key=lambda k: abs(times[k] - target))
    order = sorted(times, key=lambda k: times[k])
    exact = float(np.interp(target, [times[k] for k in order], order))
    return {"num_steps": chosen, "latency_ratio": times[chosen] / target, "interpolated": exact}


def _difference(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Mean of first - second over the episodes that both have, of coverage and of success."""
    if first is None or second is None:
        return None
    both = min(len(first["score"]), len(second["score"]))
    result: dict[str, Any] = {"episodes": both}
    for key, name in (("score", "coverage"), ("success", "success")):
        mine, other = (np.asarray(arm[key][:both], dtype=np.float64) for arm in (first, second))
        result[name] = float((mine - other).mean())
        result[f"{name}_ci95"] = list(paired_difference_interval(mine, other))
    return result


def _arm_row(arm: dict[str, Any], arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    score: NDArray[np.float64] = np.asarray(arm["score"], dtype=np.float64)
    success = int(np.sum(arm["success"]))
    about = (
        "policy",
        "num_steps",
        "method",
        "share",
        "settings",
        "episodes",
        "parity",
        "wall_seconds",
        "date",
    )
    full = arms.get(Group(arm["policy"], arm["num_steps"]).arm("full")) if arm["method"] != "full" else None
    return {
        **{key: arm[key] for key in about},
        "coverage": float(score.mean()),
        "coverage_ci95": list(mean_interval(score)),
        "success": success / len(score),
        "success_ci95": list(wilson_interval(success, len(score))),
        "difference_to_full": _difference(arm, full),
    }


def bar(group: dict[str, Any]) -> dict[str, Any]:
    """Which schedules keep the coverage of the full computation, and the fastest of them in each backend."""
    kept = [
        method
        for method, difference in group["against_full"].items()
        if difference is not None and difference["coverage_ci95"][0] >= MARGIN
    ]
    fastest = {}
    for backend, timed in group["backends"].items():
        if kept:
            best = max(kept, key=lambda method: timed["schedules"][method]["speed_up"])
            settings = group["calibration"][best]["settings"]
            fastest[backend] = {"method": best, **timed["schedules"][best], "settings": settings}
    return {"margin": MARGIN, "schedules_that_keep_it": kept, "fastest": fastest}


def _span(mean: float, interval: list[float], digits: int = 3) -> str:
    return f"{mean:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _change(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    low, high = difference["coverage_ci95"]
    return f"{100 * difference['coverage']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(content: dict[str, Any]) -> str:
    """Markdown: all arms with their latencies, then every schedule beside fewer steps, then the bar."""
    times = " | ".join(f"{backend} p50 (p99) ms" for backend in BACKENDS)
    lines = [
        f"| policy | K | schedule | f | coverage | success | to full, points | {times} |",
        "|" + " --- |" * (7 + len(BACKENDS)),
    ]
    for arm in sorted(
        content["arms"], key=lambda a: (a["policy"], -a["num_steps"], a["method"] != "full", a["method"])
    ):
        cells = [arm["policy"], str(arm["num_steps"]), arm["method"], f"{arm['share']:.3f}"]
        cells += [_span(arm[key], arm[f"{key}_ci95"]) for key in ("coverage", "success")]
        cells += [_change(arm["difference_to_full"])]
        for backend in BACKENDS:
            found = _latency_of(content, arm, backend)
            cells.append("" if found is None else f"{found['p50']:.2f} ({found['p99']:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    head = "policy | K | backend | schedule | f | faster than full | fewer steps as fast | its latency"
    lines += ["", f"| {head} | schedule - fewer steps, points |", "|" + " --- |" * 9]
    for group in content["groups"]:
        for backend, timed in group["backends"].items():
            for method, cached in timed["schedules"].items():
                fewer = cached["fewer_steps"]
                cells = [group["policy"], str(group["num_steps"]), backend, method, f"{cached['share']:.3f}"]
                cells += [f"{cached['speed_up']:.2f}x", f"K = {fewer['num_steps']}"]
                cells += [f"{fewer['latency_ratio']:.2f}x", _change(fewer["difference"])]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _verdict(content["bar"])])


def _verdict(found: dict[str, Any]) -> str:
    kept = ", ".join(found["schedules_that_keep_it"]) or "none"
    lines = [
        f"Lower bound of the difference to full computation at least {100 * MARGIN:+.0f} points: {kept}."
    ]
    for backend, best in found["fastest"].items():
        settings = ", ".join(f"{key} {value}" for key, value in best["settings"].items())
        lines.append(
            f"{backend}: the fastest of them is {best['method']} (f = {best['share']:.3f}; {settings}), "
            f"{best['speed_up']:.2f} times as fast as the full computation."
        )
    return "\n".join(lines)


def _latency_of(content: dict[str, Any], arm: dict[str, Any], backend: str) -> dict[str, float] | None:
    """The arm's percentiles, from the first group that timed it."""
    for group in content["groups"]:
        timed = group["backends"].get(backend)
        if timed is None or group["policy"] != arm["policy"]:
            continue
        same = group["num_steps"] == arm["num_steps"]
        name = arm["method"] if same else f"K{arm['num_steps']}" if arm["method"] == "full" else ""
        if name in timed["rows"]:
            return cast("dict[str, float]", timed["rows"][name]["milliseconds"])
    return None


def plot(content: dict[str, Any], path: Path) -> None:
    """Coverage above, success below, against median latency; a column for each backend."""
    marks = {"acs": "o", "acs+bua5": "s", "acs+bua3": "D", "searched": "*", "uniform": "^"}
    labels = {"acs+bua5": "ACS+BUA, n = 5", "acs+bua3": "ACS+BUA, n = 3", "acs": "ACS"}
    shown = [b for b in BACKENDS if content["groups"][0]["backends"].get(b)]
    if not shown:
        return
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with house_figure(path, columns=len(shown), rows=2, width=4.4 * len(shown), height=7.6) as (figure, axes):
        for index, axis in enumerate(axes):
            metric, backend = ("coverage", "success")[index // len(shown)], shown[index % len(shown)]
            points = [
                (arm, found["p50"])
                for arm in content["arms"]
                if (found := _latency_of(content, arm, backend)) is not None
            ]
            for policy, color in (("flow_matching", BLUE), ("shortcut", GREEN)):
                plain = sorted(
                    ((ms, arm) for arm, ms in points if arm["policy"] == policy and arm["method"] == "full"),
                    key=lambda pair: pair[0],
                )
                _errors(axis, plain, metric, color, policy.replace("_", " ") + ", K steps", "o-", 4)
                for ms, arm in plain:
                    if arm["num_steps"] in (1, 2, 4, 10, 16, 50, 64, 100):
                        below = -12 if policy == "shortcut" else 6
                        axis.annotate(
                            str(arm["num_steps"]), (ms, arm[metric]), (0, below), textcoords="offset points",
                            fontsize=7, color=color, ha="center",
                        )  # fmt: skip
            for method, mark in marks.items():
                cached = [
                    (ms, arm) for arm, ms in points
                    if arm["method"] == method and (arm["policy"], arm["num_steps"]) == ("flow_matching", 100)
                ]  # fmt: skip
                label = f"K = 100 cached, {labels.get(method, method)}"
                _errors(axis, cached, metric, GREY if method == "uniform" else ORANGE, label, mark, 7)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(0.6 if metric == "coverage" else 0, 1.0 if metric == "coverage" else None)
            axis.set_title(f"{metric.capitalize()}, {backend}")
            axis.set_xlabel("milliseconds a chunk, median, one thread")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


def _errors(
    axis: Any, points: list[tuple[float, Any]], metric: str, color: str, label: str, mark: str, size: int
) -> None:
    if points:
        means = np.array([arm[metric] for _, arm in points])
        ends = np.array([arm[f"{metric}_ci95"] for _, arm in points])
        axis.errorbar(
            [ms for ms, _ in points], means, yerr=np.abs(ends - means[:, None]).T, color=color, label=label,
            fmt=mark, ms=size, lw=1.2, elinewidth=0.7,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="", help="the flow-matching policy")
    parser.add_argument("--shortcut", default="", help="the shortcut policy")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--only", default="", help="only arms whose file name contains this text")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--report", action="store_true", help="collect what is there, run nothing")
    parser.add_argument("--folder", default="", help="of the arms' files; others write no results")
    parser.add_argument("--search-iterations", type=int, default=CalibrationConfig.search_iterations)
    parser.add_argument("--calls", type=int, default=0, help="timed calls of each sampler; 0 takes the usual")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = Study(arguments)
    if not arguments.report:
        study.run()
    content = study.collect()
    results, image = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
    if arguments.folder:
        results = image = study.folder / "report"
    write_json(results / "caching-pusht.json", content)
    plot(content, image / "caching-pusht.png")
    if schedules := study.schedules(GROUPS[0]):
        about = f"Push-T, flow matching, K = {GROUPS[0].num_steps}, S = {UPDATES}"
        plot_schedules(schedules, image / "caching-schedules.png", title=about)
    print(table(content))


if __name__ == "__main__":
    main()
