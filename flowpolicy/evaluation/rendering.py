"""Off-screen rendering on machines without a display: which OpenGL MuJoCo can use here."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import subprocess
import sys

logger = logging.getLogger(__name__)

NO_GL_BACKEND = (
    "no off-screen OpenGL works here (install libegl1 or libosmesa6, on Debian and Ubuntu with "
    "apt-get install libegl1, or set MUJOCO_GL to one that does)"
)
_PROBE = "import mujoco; c = mujoco.GLContext(8, 8); c.make_current(); c.free()"


@functools.cache
def choose_gl_backend() -> str | None:
    """Set ``MUJOCO_GL`` to a backend that works here; call it before MuJoCo is first imported.

    A value the user has set is tried alone; otherwise EGL, then OSMesa, then, with a display, GLFW. Each
    is tried in a process of its own (about a second), since a failed one can end the process. macOS and
    Windows have their own off-screen OpenGL and are left alone.

    Returns:
        The backend's name, or None when none works: report ``NO_GL_BACKEND`` and go on without a picture.
    """
    if importlib.util.find_spec("mujoco") is None:
        return None
    if not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL") or ("cgl" if sys.platform == "darwin" else "wgl")
    candidates = _candidates()
    for name in candidates:
        if _works(name):
            os.environ["MUJOCO_GL"] = name
            logger.debug("rendering with %s", name)
            return name
    return None


def refused_gl_choice() -> str | None:
    """One sentence where MuJoCo could not be imported because of what ``MUJOCO_GL`` says, else None."""
    chosen = os.environ.get("MUJOCO_GL")
    if not chosen or "mujoco" in sys.modules or importlib.util.find_spec("mujoco") is None:
        return None
    return (
        f"MUJOCO_GL is {chosen!r}, which MuJoCo does not know or whose library is missing here; unset it, "
        "set it to another one, or install what it needs (egl: libegl1; osmesa: libosmesa6)."
    )


def _candidates() -> list[str]:
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        return [chosen]
    has_display = bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return ["egl", "osmesa", *(["glfw"] if has_display else [])]


def _works(name: str) -> bool:
    environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = name
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return probe.returncode == 0
