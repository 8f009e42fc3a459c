"""A control run as one HTML page: a verdict, figures, pictures, and every kind of event that occurred."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2  # PyTorch needs it itself

from flowpolicy.control.events import EXPLAINED, Event, name_of
from flowpolicy.control.statistics import Columns, run_statistics
from flowpolicy.files.storage import atomic_file
from flowpolicy.rounding import three_digits

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(
    path: Path,
    columns: Columns,
    events: Mapping[str, Any],
    about: Mapping[str, Any],
    video: Path | None = None,
) -> Path:
    """Write the page; it needs no other file but the video, which it names beside it.

    Args:
        path: of the page.
        columns: of the telemetry.
        events: of :meth:`flowpolicy.control.events.EventLog.content`.
        about: what ran: ``task``, ``rate_hz``, ``stopped`` and whatever else is to be shown.
        video: an mp4 in the same folder.

    Returns:
        ``path``.
    """
    period = 1.0 / float(about["rate_hz"])
    run, stopped = run_statistics(columns, period), str(about.get("stopped", ""))
    content: dict[str, Any] = {
        "task": about.get("task", "robot"),
        "command": about.get("command", ""),
        "rate": f"{float(about['rate_hz']):g}",
        "period": period,
        "stopped": stopped,
        "run": run,
        "video": None if video is None else video.name,
        "events": _events(events, columns),
        "settings": _flat(about),
    }
    if run["ticks"]:
        content |= _verdict(run, stopped) | {
            "kept": (int(columns["tick"][0]), int(columns["tick"][-1])),
            "distributions": {label: run[key] for key, label in _DISTRIBUTIONS.items()},
            "figures": _figures(run),
            "pictures": _pictures(columns, period),
        }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"digits": three_digits, "count": lambda number: f"{number:,}"}
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(content)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


_DISTRIBUTIONS = {
    "jitter_ms": "start after deadline, ms",
    "work_us": "start to command sent, us",
    "inference_ms": "sampling a chunk, ms",
    "observation_age_ms": "age of the observation, ms",
}


def _verdict(run: Mapping[str, Any], stopped: str) -> dict[str, Any]:
    """Good below 0.5% of ticks late or safe, bad above 5% and where the run did not end as it should."""
    safe = round(run["sources"]["safe"] * run["ticks"])
    ended = stopped.startswith(("finished", "interrupted", "stopped"))
    share = (run["missed"] + safe) / (run["ticks"] + run["missed"])
    grade = "bad" if not ended or share > 0.05 else "fair" if share > 0.005 else "good"
    return {"grade": grade, "share": share, "safe": safe}


def _figures(run: Mapping[str, Any]) -> dict[str, str]:
    sources = (f"{name} {share:.1%}" for name, share in run["sources"].items() if share)
    delays = (f"{actions} actions {count:,}x" for actions, count in run["delays"].items())
    changes = [
        f"{three_digits(run[key])} {where} (p95 {three_digits(run[f'{key}_p95'])})"
        for key, where in (("seam", "at a change of chunk"), ("inside", "inside chunks"))
        if run[key] is not None
    ]
    found = {
        "drift of the schedule": f"{run['drift_us_per_s']:+.3f} us per second; "
        f"last tick {run['drift_us']:+.0f} us against the first",
        "commands from": ", ".join(sources),
        "delay of a chunk": ", ".join(delays) or "no chunk arrived",
    }
    if changes:
        found["change of the command"] = ", ".join(changes) + ", in ranges of the command"
    return found


def _events(events: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]]:
    found = []
    for event in Event:
        name = name_of(event)
        if name not in events["counts"]:
            continue
        records = [record for record in events["records"] if record["event"] == name]
        # Records are the first ones, rows the newest: of a long run neither has both ends.
        marked = columns["tick"][(columns["events"] >> event) & 1 == 1].tolist()
        ticks = [*(record["tick"] for record in records), *marked]
        found.append(
            {
                "name": name,
                "count": events["counts"][name],
                "ends": (min(ticks), max(ticks)) if ticks else (),
                "meaning": EXPLAINED[event],
                "details": [record for record in records[:5] if record["detail"]],
            }
        )
    return found


def _pictures(columns: Columns, period: float) -> dict[str, Any]:
    """What a plot shows -> the plot."""
    from flowpolicy.plots.control import plot_inference, plot_run, plot_timing, plot_window

    plots = {
        "Lateness and work of the ticks over time, and a histogram of the lateness": plot_timing,
        "Sources of the commands, events and commands over the whole run": plot_run,
        "Commands, changes of chunk and events of a few seconds, tick by tick": plot_window,
        "Sampling time, delay, age of the observations, and changes of the command": plot_inference,
    }
    return {what: _picture(draw, columns, period) for what, draw in plots.items()}


def _picture(draw: Callable[[Columns, float, Path], Path], columns: Columns, period: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return base64.b64encode(draw(columns, period, Path(folder) / "plot.png").read_bytes()).decode()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level: inner mappings in one line."""
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
