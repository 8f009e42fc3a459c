"""Judges a recorded run with an operator (scripted_operator.py): what was recorded, and what arrived on the bus.

Everything is compared tick by tick with the loop's own telemetry, and the bus with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from flowpolicy.control.events import Event, name_of
from flowpolicy.data import command_source
from flowpolicy.data.store import read_demonstrations

WHO = {"safe": command_source.SAFE, "operator": command_source.OPERATOR}
NAMED = {name_of(event): event for event in Event}
SWEEP_S = 160 / 60
"""The bar in a camera's pictures passes over them in this time."""
SHARP_S = 0.1
"""How exactly a picture tells the time: it is as old as the camera is late, and shows steps of a frame and a pixel."""


@dataclass(frozen=True)
class Ticks:
    """The telemetry of a run, a row a tick.

    Attributes:
        columns: name -> ``(n,)``.
        sent: ``(n, A)``, NaN where nothing was.
    """

    columns: dict[str, np.ndarray]
    sent: np.ndarray

    @classmethod
    def of(cls, run: Path) -> Ticks:
        """Of a run's folder."""
        table = pq.read_table(run / "telemetry.parquet")
        columns = {name: np.asarray(table[name]) for name in table.column_names}
        actions = [columns[name] for name in table.column_names if name.startswith("action_")]
        return cls(columns, np.stack(actions, axis=1))

    def has(self, *events: Event) -> np.ndarray:
        """At which ticks one of these occurred, ``(n,)``."""
        return (self.columns["events"] & sum(1 << event for event in events)) != 0

    def at(self, tick: int) -> int:
        """The row of a tick."""
        return int(np.searchsorted(self.columns["tick"], tick))


def recording(run: Path, store: Path) -> dict[str, Any]:
    """The store against what the telemetry says it must hold: ticks, commands and who was in command of every
    episode, from its first valid command to its verdict."""
    ticks, demos = Ticks.of(run), read_demonstrations(store)
    verdict = ticks.has(Event.EPISODE_SUCCESS, Event.EPISODE_FAILURE)
    kept: list[int] = []
    ends, begun = [], False
    for row, source in enumerate(ticks.columns["source"]):
        if verdict[row]:
            ends += [len(kept)] if begun else []
            begun = False
        elif begun or source != "safe":
            kept.append(row)
            begun = True
    ends += [len(kept)] if begun else []
    number, sent = ticks.columns["tick"], ticks.sent[kept].copy()
    for row in np.flatnonzero(np.isnan(sent[:, 0])):  # nothing could be sent: the robot keeps what it had
        sent[row] = sent[row - 1]
    who = [WHO.get(source, command_source.POLICY) for source in ticks.columns["source"][kept]]
    arrays = demos.arrays
    found = {
        "episodes": demos.num_episodes, "steps": demos.num_steps, "masks": {k: len(v) for k, v in demos.masks.items()},
        "ticks_that_did_not_happen": int(number[-1] - number[0] + 1 - len(number)),
        "commanded": command_source.commanded_shares(arrays),
        "episode_ends_equal": demos.episode_ends.tolist() == ends,
    }  # fmt: skip
    for key, expected in (("tick", number[kept]), ("action", sent), ("source", np.array(who))):
        found[f"{key}_equal"] = bool(np.array_equal(arrays[key], expected))
    measured = ticks.columns["started"][kept] - ticks.columns["observation_age"][kept]
    cameras = [key for key in arrays if key.startswith("images.")]
    found["frames"] = {key: frames(arrays[key], measured) for key in cameras}
    return found


def frames(images: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """Whether a camera's pictures ``(n, h, w, 3)`` are its own, and from when their observations were measured."""
    blue = images[..., 2]
    bar = np.median(blue, axis=1) > 240
    angle = 2 * np.pi * (np.arange(bar.shape[1]) + 0.5) / bar.shape[1]
    shown = np.angle((bar * np.exp(1j * angle)).sum(1)) * SWEEP_S / (2 * np.pi)
    turn = np.exp(2j * np.pi * (measured - shown) / SWEEP_S)
    late = np.angle(turn / np.exp(1j * np.angle(turn.mean()))) * SWEEP_S / (2 * np.pi)
    return {
        "pictures": len(images), "tint": float(np.median(blue)),
        "on_time": float((np.abs(late) <= SHARP_S).mean()),
    }  # fmt: skip


def named(run: Path, done: list[dict[str, Any]]) -> dict[str, int]:
    """How often each thing that the operator did is an event of its very tick; an error where one is not."""
    ticks = Ticks.of(run)
    counts: dict[str, int] = {}
    for each in done:
        kind = each["kind"]
        assert ticks.has(NAMED[kind])[ticks.at(each["tick"])], f"tick {each['tick']}: no {kind}"
        counts[kind] = counts.get(kind, 0) + 1
    for kind, count in counts.items():
        assert int(ticks.has(NAMED[kind]).sum()) == count, kind
    return counts


def arrivals(
    run: Path,
    bus: np.ndarray,
    times: np.ndarray,
    done: list[dict[str, Any]],
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """What arrived on the bus where the operator took over and gave back.

    Args:
        run: the run's folder.
        bus: goals ``(n, A)`` in the robot's units, in their order.
        times: ``(n,)`` at which they arrived.
        done: by the operator.
        limits: ``step`` ``(A,)`` the bus' resolution, ``velocity`` the most change a tick, ``period`` of a tick.
    """  # fmt: skip
    ticks, step, velocity = Ticks.of(run), limits["step"], limits["velocity"]
    rows = np.flatnonzero(np.isfinite(ticks.sent[:, 0]))
    first = next(  # the last of all is the safe action at the end, unless the bus was busy
        first for first in (len(bus) - 1 - len(rows), len(bus) - len(rows))
        if first >= 0 and (np.abs(bus[first : first + len(rows)] - ticks.sent[rows]) <= 1.01 * step).all()
    )  # fmt: skip
    goal = dict(zip(rows.tolist(), range(first, first + len(rows)), strict=True))
    source, change = ticks.columns["source"], np.abs(np.diff(bus, axis=0)) - step
    failed = ticks.has(Event.OBSERVATION_STALE, Event.ROBOT_ERROR)
    delays, waits, unexplained, seams = [], [], 0, {"take over": [0.0], "hand back": [0.0]}
    for each in done:
        if each["kind"] not in seams:
            continue
        asked = at = ticks.at(each["tick"])
        wanted = ("operator",) if each["kind"] == "take over" else ("chunk", "previous", "fast")
        while at < len(source) and source[at] not in wanted:
            at += 1
        if at not in goal:
            continue  # the run ended first
        seams[each["kind"]].append(float((change[goal[at] - 1] / velocity).max()))
        if each["kind"] == "hand back":
            continue
        if at == asked:
            move = np.clip(np.subtract(each["asked"], each["sent"]), -velocity, velocity)
            assert (np.abs(bus[goal[at]] - (each["sent"] + move)) <= 1.01 * step + 1e-4).all(), each
            delays.append(1e3 * (times[goal[at]] - each["time"]))
        else:  # a tick after one that the robot may not have got makes sure of that first
            waits.append(int(ticks.columns["tick"][at] - each["tick"]))
            unexplained += int(not (failed[asked - 1 : at - 1] | failed[asked:at]).all())
    return {
        "goals_of_ticks": len(rows), "take_overs_in_their_tick": len(delays),
        "take_overs_after_a_failure_of_the_bus": len(waits), "ticks_waited": waits, "unexplained": unexplained,
        "reading_to_bus_ms": {"p50": float(np.median(delays)), "max": float(max(delays))},
        "of_a_period": float(max(delays)) / (1e3 * limits["period"]),
        "largest_change_in_velocity_limits_per_tick": {kind: max(found) for kind, found in seams.items()},
    }  # fmt: skip


def log_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the operator of a run did."""
    done: list[dict[str, Any]] = json.loads((folder / f"operator-{name}.json").read_text())
    return done
