"""The style of the package's figures, and elements that several of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flowpolicy.files.storage import atomic_file
from flowpolicy.optional import optional

# Okabe and Ito's palette, its yellow darkened for white: distinguishable with any colour vision, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"
AMBER, PINK = "#E69F00", "#CC79A7"
PALETTE = (BLUE, ORANGE, GREEN, AMBER, PINK, "#56B4E9", "#B8A800", "#000000")
PALE = "#E4E6EA"

_STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
_SMALL = {
    "axes.titlesize": 7.5,
    "axes.titleweight": "normal",
    "axes.titlepad": 3,
    "axes.grid": False,
    "axes.labelsize": 8,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
LABELS = {"return": "return", "success": "success rate", "score": "score"}


@contextlib.contextmanager
def house_figure(
    path: Path | str,
    *,
    columns: int,
    width: float,
    height: float,
    rows: int = 1,
    title: str = "",
    small: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Yield (figure, axes, row by row) in the house style and save it; no global state is touched.

    Args:
        path: image file; the suffix chooses the format.
        columns: of axes.
        width: of the figure, inches.
        height: of the figure, inches.
        rows: of axes.
        title: over the figure.
        small: many little panels, to be glanced over.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with optional("Plots need matplotlib", "train"):
        import matplotlib
        from cycler import cycler
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    style = _STYLE | {"axes.prop_cycle": cycler(color=PALETTE)} | (_SMALL if small else {})
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        yield figure, axes
        with atomic_file(path) as temporary:
            if temporary.suffix == ".png":
                canvas.print_png(temporary)  # the same file; savefig would draw it twice
            else:
                figure.savefig(temporary)


def reference_line(axis: Any, height: float | None, name: str) -> None:
    """A dashed line at what the others are compared with, its value in the legend; nothing of None."""
    if height is not None:
        axis.axhline(height, color=GREY, ls="--", lw=1.4, label=f"{name}, {height:.4g}")


def points_with_intervals(axis: Any, x: Any, means: Any, ends: Any, **style: Any) -> None:
    """A line through ``means`` with the intervals ``ends`` (n, 2) as bars; an unknown interval has none."""
    spans = np.nan_to_num(np.abs(np.asarray(ends, dtype=float) - np.asarray(means, dtype=float)[:, None]))
    axis.errorbar(x, means, yerr=spans.T, marker="o", ms=4, capsize=3, lw=1.4, **style)


def count_steps(axis: Any, name: str) -> None:
    """Label the horizontal axis of a training run: few ticks, 300k in place of 300000."""
    from matplotlib.ticker import EngFormatter

    axis.set_xlabel(name)
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def plain_log_ticks(axis: Any) -> None:
    """Ticks 1, 2, 5, 10, ... of a logarithmic horizontal axis, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def say(axis: Any, text: str, **style: Any) -> None:
    """A few words in the middle of a panel in place of what cannot be drawn."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=GREY, **style)
