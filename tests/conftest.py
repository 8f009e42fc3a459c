"""What tests of every folder share."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Small tensors: a second thread helps little, and on a busy machine waiting for it costs a hundredfold.
# Programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else the first compilation tries one instruction set after another, for ten seconds; the code is the same.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import numpy as np
import pytest

if TYPE_CHECKING:
    from flowpolicy.data.store import Demonstrations

# What takes seconds to make in each process that needs it, by words of the files that need it.
MADE_ONCE = {
    "forking_python": "process of imports",
    "models_compiled_once": "simulator models",
    "exports": "samplers",
    '"compile"': "samplers",
    '"onnx"': "samplers",
}

# What a shell or nohup starts in the background ignores these, as would the programs that tests interrupt.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def few_objects_to_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test finds is not searched for garbage: a full collection, as when a control loop starts, would
    take a quarter of a second, where it takes a millisecond in a program of its own."""
    gc.collect()
    gc.freeze()
    monkeypatch.setattr(gc, "unfreeze", lambda: None)  # of a control loop that ends


@pytest.fixture(autouse=True)
def ordinary_scheduling() -> Iterator[None]:
    """No test leaves the process at a priority that keeps others from their cores."""
    before = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    assert before is None or os.sched_getscheduler(0) == before


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch  # here, since a process that only hands tests to others has no use for it

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repo_root: Path) -> Path:
    """Folder of real demonstrations; the test is skipped where there is none."""
    folder = Path(os.environ.get("FLOWPOLICY_TEST_DATA", repo_root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real demonstrations at {folder}; set FLOWPOLICY_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def forking_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program to use as ``python``, without the seconds that its imports take."""
    if not hasattr(os, "fork"):
        yield Path(sys.executable)
        return
    from forking_python import start

    with start(tmp_path_factory.mktemp("python")) as python:
        yield python


@pytest.fixture
def empty_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and saved as empty files, where drawing them would take longer than what is tested."""
    with contextlib.suppress(ImportError):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda self, path: Path(path).write_bytes(b""))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``, one worker also has all the files that need one thing of ``MADE_ONCE``."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def group(file: str) -> str:
        text = (config.rootpath / file).read_text(encoding="utf-8")
        return next((thing for word, thing in MADE_ONCE.items() if word in text), file)

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture
def demos() -> Demonstrations:
    """Four short episodes with two observation keys, two-dimensional actions, rewards and ends."""
    from flowpolicy.data.store import Demonstrations

    rng = np.random.default_rng(0)
    lengths = [7, 12, 5, 9]
    ends = np.cumsum(lengths)
    steps = int(ends[-1])
    terminated = np.zeros(steps, bool)
    terminated[ends - 1] = True
    return Demonstrations(
        {
            "observation": rng.normal(size=(steps, 3)).astype(np.float32),
            "goal": rng.normal(size=(steps, 2, 2)).astype(np.float32),
            "action": rng.uniform(-1, 1, size=(steps, 2)).astype(np.float32),
            "reward": rng.normal(size=steps).astype(np.float32),
            "terminated": terminated,
        },
        ends,
        {"env_id": "Toy-v0", "fps": 10.0, "licence": "MIT"},
        "synthetic demonstrations",
    )
