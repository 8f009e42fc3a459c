"""A control run as one HTML page: a verdict, figures, pictures, and every kind of event that occurred."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flowpolicy.control.events import EXPLAINED, Event, name_of
from flowpolicy.control.report_plots import plot_actions, plot_inference, plot_timing
from flowpolicy.control.statistics import Columns, run_statistics
from flowpolicy.storage import atomic_file

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202428; max-width: 1040px; margin: 32px auto }
body { padding: 0 16px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 32px 0 8px }
.verdict { padding: 10px 14px; border-left: 6px solid; background: #f4f5f7; margin: 12px 0 }
.good { border-color: #009E73 } .fair { border-color: #E69F00 } .bad { border-color: #D55E00 }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums }
td, th { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e6ea }
th { font-weight: 600 } img { max-width: 100% } .note { color: #5f6368 } code { font-size: 13px }
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
        _verdict(statistics, events["counts"], about),
    ]
    if statistics["ticks"]:
        parts += [
            "<h2>Figures</h2>",
            _figures(statistics),
            _picture(lambda file: plot_timing(columns, period, file)),
            _picture(lambda file: plot_inference(columns, file)),
            _picture(lambda file: plot_actions(columns, file)),
        ]
    if video is not None:
        parts.append(f'<h2>Video</h2><video controls width="480" src="{html.escape(video.name)}"></video>')
    parts += ["<h2>Events</h2>", _events(events), "<h2>What ran</h2>", _table(_flat(about))]
    title = html.escape(f"Control run: {about.get('task', 'robot')}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _verdict(statistics: Mapping[str, Any], counts: Mapping[str, int], about: Mapping[str, Any]) -> str:
    """The run in two sentences, and a colour."""
    ticks = statistics["ticks"]
    if not ticks:
        return '<div class="verdict bad">No tick was run.</div>'
    missed = counts.get(name_of(Event.DEADLINE_MISSED), 0)
    safe = round(statistics["sources"]["safe"] * ticks)
    stopped = str(about.get("stopped", ""))
    ended = stopped in ("finished", "interrupted", "stopped")
    share = (missed + safe) / (ticks + missed)
    grade = "bad" if not ended or share > 0.05 else "fair" if share > 0.005 else "good"
    jitter = statistics["jitter_ms"]
    return (
        f'<div class="verdict {grade}">'
        f"<b>{statistics['seconds']:.1f} s at {float(about['rate_hz']):g} Hz</b>, "
        f"ended: {_text(stopped)}.<br>"
        f"{ticks:,} ticks ran, {missed:,} could not begin in time, {safe:,} sent the safe action. Half of "
        f"the ticks began within {jitter['p50']:.3f} ms of their deadline, 99% within "
        f"{jitter['p99']:.3f} ms, the latest {jitter['max']:.1f} ms after it.</div>"
    )


def _figures(statistics: Mapping[str, Any]) -> str:
    names = {
        "jitter_ms": "start after deadline, ms",
        "work_us": "start to command sent, us",
        "inference_ms": "planning a chunk, ms",
        "observation_age_ms": "age of the observation, ms",
    }
    rows = ["<tr><th></th><th>p50</th><th>p95</th><th>p99</th><th>p99.9</th><th>max</th></tr>"]
    for key, label in names.items():
        values = statistics[key]
        if values is not None:
            cells = "".join(f"<td>{value:.4g}</td>" for value in values.values())
            rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    more: dict[str, Any] = {
        "drift of the schedule": f"{statistics['drift_us_per_s']:+.3f} us per second",
        "actions from": ", ".join(
            f"{name} {share:.1%}" for name, share in statistics["sources"].items() if share
        ),
    }
    if statistics["seam"] is not None and statistics["inside"] is not None:
        more["change of the command"] = (
            f"{statistics['seam']:.4f} of its range at a change of chunk, "
            f"{statistics['inside']:.4f} elsewhere"
        )
    return f"<table>{''.join(rows)}</table>{_table(more)}"


def _events(events: Mapping[str, Any]) -> str:
    if not events["counts"]:
        return '<p class="note">None.</p>'
    rows = ["<tr><th>event</th><th>times</th><th>first</th><th>what it is, and the first ones</th></tr>"]
    for event in Event:
        name = name_of(event)
        if name not in events["counts"]:
            continue
        records = [record for record in events["records"] if record["event"] == name]
        first = f"tick {records[0]['tick']:,}" if records else ""
        details = "".join(
            f"<br><code>tick {record['tick']:,}: {_text(record['detail'])}</code>"
            for record in records[:5]
            if record["detail"]
        )
        what = f'<span class="note">{_text(EXPLAINED[event])}</span>{details}'
        rows.append(
            f"<tr><td>{name}</td><td>{events['counts'][name]:,}</td><td>{first}</td><td>{what}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _picture(draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plot.png"
        draw(file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


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


def _text(value: Any) -> str:
    return html.escape(str(value))
