"""The house style of the package's figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowpolicy.errors import ConfigError
from flowpolicy.files.storage import atomic_file

# Okabe and Ito's palette: told apart with any colour vision, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5F6368"

_STYLE = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E6EA",
    "grid.linewidth": 0.8,
    "axes.edgecolor": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
LABELS = {"return": "return", "success": "success rate", "score": "score"}
KEYS = {
    "return": ("return_mean", "return_ci95"),
    "success": ("success_rate", "success_ci95"),
    "score": ("score_mean", "score_ci95"),
}


@contextlib.contextmanager
def house_figure(
    path: Path | str, *, columns: int, width: float, height: float, rows: int = 1
) -> Iterator[tuple[Any, Any]]:
    """Yield (figure, axes, row by row) in the house style and save it; no global state is touched."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Plots need matplotlib; install it with: pip install 'flowpolicy[train]'."
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        yield figure, axes
        with atomic_file(path) as temporary:
            figure.savefig(temporary)
