"""A control run as one HTML page: a verdict, figures, pictures, and every kind of event that occurred."""

from __future__ import annotations

import base64
import html
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowpolicy.control.events import EXPLAINED, Event, name_of
from flowpolicy.control.statistics import Columns, run_statistics
from flowpolicy.files.storage import atomic_file
from flowpolicy.plots.control import plot_inference, plot_run, plot_timing, plot_window

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202428; max-width: 1040px; margin: 32px auto }
body { padding: 0 16px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 32px 0 8px }
.verdict { padding: 10px 14px; border-left: 6px solid; background: #f4f5f7; margin: 12px 0 }
.good { border-color: #009E73 } .fair { border-color: #E69F00 } .bad { border-color: #D55E00 }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e6ea }
th { font-weight: 600 } .number { text-align: right } .whole { white-space: nowrap }
img { display: block; width: 100%; margin: 14px 0 } .note { color: #5f6368 } code { font-size: 13px }
code { overflow-wrap: anywhere }
"""


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
    statistics = run_statistics(columns, period)
    parts = [
        f"<h1>{_text(about.get('task', 'robot'))}</h1>",
        f'<div class="note">{_text(about.get("command", ""))}</div>',
        _verdict(statistics, about),
    ]
    if statistics["ticks"]:
        parts += ["<h2>Figures</h2>", _newest(columns), _figures(statistics)]
        parts += [_picture(draw, what, columns, period) for draw, what in _PICTURES.items()]
    if video is not None:
        parts.append(f'<h2>Video</h2><video controls width="480" src="{html.escape(video.name)}"></video>')
    parts += ["<h2>Events</h2>", _events(events, columns, period), "<h2>What ran</h2>", _table(_flat(about))]
    title = html.escape(f"Control run: {about.get('task', 'robot')}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


_PICTURES: dict[Callable[[Columns, float, Path], None], str] = {
    plot_timing: "Lateness and work of the ticks over time, and a histogram of the lateness",
    plot_run: "Sources of the commands, events and commands over the whole run",
    plot_window: "Commands, changes of chunk and events of a few seconds, tick by tick",
    plot_inference: "Planning time, delay, age of the observations, and changes of the command",
}

_GRADES = {"good": "Good", "fair": "Fair", "bad": "Poor"}


def _verdict(statistics: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The run in a few sentences, and a colour: green below 0.5% of ticks late or safe, red above 5%."""
    ticks, stopped = statistics["ticks"], str(about.get("stopped", ""))
    if not ticks:
        why = f" The run ended: {_text(stopped)}." if stopped else ""
        return f'<div class="verdict bad"><b>No tick was run.</b>{why}</div>'
    missed, safe = statistics["missed"], round(statistics["sources"]["safe"] * ticks)
    ended = stopped.startswith(("finished", "interrupted", "stopped"))
    share = (missed + safe) / (ticks + missed)
    grade = "bad" if not ended or share > 0.05 else "fair" if share > 0.005 else "good"
    jitter = statistics["jitter_ms"]
    return (
        f'<div class="verdict {grade}">'
        f"<b>{_GRADES[grade]}: {statistics['seconds']:,.1f} s at {float(about['rate_hz']):g} Hz</b>, "
        f"ended: {_text(stopped)}.<br>"
        f"{ticks:,} ticks ran. {missed:,} could not begin within their period and {safe:,} sent the safe "
        f"action, {share:.2%} together. Half of the ticks began within {_number(jitter['p50'])} ms of their "
        f"deadline, 99% within {_number(jitter['p99'])} ms, the latest {_number(jitter['max'])} ms after "
        "it.</div>"
    )


def _newest(columns: Columns) -> str:
    """Which part of the run the rows are, where they are not all of it."""
    first, last = int(columns["tick"][0]), int(columns["tick"][-1])
    if first == 0:
        return ""
    return (
        f'<p class="note">Telemetry kept ticks {first:,} to {last:,}; figures and pictures are of them.</p>'
    )


def _figures(statistics: Mapping[str, Any]) -> str:
    names = {
        "jitter_ms": "start after deadline, ms",
        "work_us": "start to command sent, us",
        "inference_ms": "planning a chunk, ms",
        "observation_age_ms": "age of the observation, ms",
    }
    header = "".join(f'<th class="number">{name}</th>' for name in ("p50", "p95", "p99", "p99.9", "max"))
    rows = [f"<tr><th></th>{header}</tr>"]
    for key, label in names.items():
        values = statistics[key]
        if values is not None:
            cells = "".join(f'<td class="number">{_number(value)}</td>' for value in values.values())
            rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    delays = statistics["delays"]
    more: dict[str, Any] = {
        "drift of the schedule": f"{statistics['drift_us_per_s']:+.3f} us per second; "
        f"last tick {statistics['drift_us']:+.0f} us against the first",
        "commands from": ", ".join(
            f"{name} {share:.1%}" for name, share in statistics["sources"].items() if share
        ),
        "delay of a chunk": ", ".join(f"{actions} actions {count:,}x" for actions, count in delays.items())
        or "no chunk arrived",
    }
    changes = [
        f"{_number(statistics[key])} {where} (p95 {_number(statistics[f'{key}_p95'])})"
        for key, where in (("seam", "at a change of chunk"), ("inside", "inside chunks"))
        if statistics[key] is not None
    ]
    if changes:
        more["change of the command"] = ", ".join(changes) + ", in ranges of the command"
    return f"<table>{''.join(rows)}</table>{_table(more)}"


def _events(events: Mapping[str, Any], columns: Columns, period: float) -> str:
    if not events["counts"]:
        return '<p class="note">None.</p>'
    rows = [
        "<tr><th>event</th><th>times</th><th>first</th><th>last</th>"
        "<th>what it is, and the details of the first ones</th></tr>"
    ]
    for event in Event:
        name = name_of(event)
        if name not in events["counts"]:
            continue
        records = [record for record in events["records"] if record["event"] == name]
        # Records are the first ones, rows the newest: of a long run neither has both ends.
        marked = columns["tick"][(columns["events"] >> event) & 1 == 1].tolist()
        ticks = [*(record["tick"] for record in records), *marked]
        ends = "".join(
            f'<td class="whole">{tick * period:,.2f} s<br><span class="note">tick {tick:,}</span></td>'
            for tick in ((min(ticks), max(ticks)) if ticks else ())
        )
        details = "".join(
            f"<br><code>tick {record['tick']:,}: {_text(record['detail'])}</code>"
            for record in records[:5]
            if record["detail"]
        )
        what = f'<span class="note">{_text(EXPLAINED[event])}</span>{details}'
        rows.append(
            f'<tr><td class="whole">{name}</td><td>{events["counts"][name]:,}</td>'
            f"{ends or '<td></td><td></td>'}<td>{what}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _picture(draw: Callable[[Columns, float, Path], None], what: str, columns: Columns, period: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plot.png"
        draw(columns, period, file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{what}" src="data:image/png;base64,{data}">'


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """One level: inner mappings in one line."""
    return {
        key: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if not value or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
