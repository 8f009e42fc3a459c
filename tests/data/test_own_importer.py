"""The importer in docs/extend/importer.md as it stands there, from outside the package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages import Page

for module in ("zarr", "h5py", "pyarrow"):
    pytest.importorskip(module)

from flowpolicy.data.importers import FORMATS, detect_format, import_demonstrations  # noqa: E402
from flowpolicy.data.store import Demonstrations, read_demonstrations  # noqa: E402
from flowpolicy.errors import ConfigError, DataError  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend" / "importer.md"
LENGTHS = (5, 3, 7)


@pytest.fixture
def own_importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file, in a folder where Python finds it."""
    if not PAGE.exists():
        pytest.skip("the documentation is not part of an installed package")
    (tmp_path / "csv_logs.py").write_text(Page.read(PAGE).files["csv_logs.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    FORMATS.pop("csv_logs", None)
    sys.modules.pop("csv_logs", None)


def write_logs(folder: Path, delimiter: str = ",") -> np.ndarray:
    """Logs in natural order; gives the steps ``(15, 5)``."""
    folder.mkdir()
    steps = np.random.default_rng(0).normal(size=(sum(LENGTHS), 5)).astype(np.float32)
    header = delimiter.join(["action.x", "action.y", "state.x", "state.y", "state.z"])
    for number, rows in enumerate(np.split(steps, np.cumsum(LENGTHS)[:-1])):
        np.savetxt(folder / f"log_{number}.csv", rows, delimiter=delimiter, header=header, comments="")
    return steps


def assert_same(demos: Demonstrations, steps: np.ndarray) -> None:
    assert demos.episode_lengths.tolist() == list(LENGTHS)
    np.testing.assert_allclose(demos.arrays["action"], steps[:, :2], rtol=1e-6)
    np.testing.assert_allclose(demos.arrays["state"], steps[:, 2:], rtol=1e-6)
    assert demos.attributes["imported_format"] == "csv_logs"
    assert (demos.attributes["imported_from"], demos.attributes["fps"]) == ("logs", 20)


@pytest.mark.usefixtures("own_importer")
def test_an_importer_of_ones_own_by_name_and_by_detection(tmp_path: Path) -> None:
    steps = write_logs(tmp_path / "logs")
    assert_same(import_demonstrations(tmp_path / "logs", "csv_logs:csv_logs"), steps)
    assert detect_format(tmp_path / "logs") == "csv_logs"
    assert_same(import_demonstrations(tmp_path / "logs"), steps)
    write_logs(tmp_path / "other", ";")
    with pytest.raises(DataError, match="other"):
        import_demonstrations(tmp_path / "other", "csv_logs")
    demos = import_demonstrations(tmp_path / "other", "csv_logs", options={"delimiter": ";"}, keys=["state"])
    assert set(demos.arrays) == {"action", "state"}
    with pytest.raises(ConfigError, match=r"options\.delimiter"):
        import_demonstrations(tmp_path / "logs", "csv_logs", options={"delimitr": ";"})


@pytest.mark.usefixtures("own_importer")
def test_what_it_does_wrong_is_said_in_one_sentence(tmp_path: Path) -> None:
    write_logs(tmp_path / "logs")
    (tmp_path / "logs" / "log_1.csv").write_text("action.x,action.y,state.x\n1,2,word\n")
    with pytest.raises(DataError, match=r"logs .*cannot be read at 'state'"):
        import_demonstrations(tmp_path / "logs", "csv_logs:csv_logs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        import_demonstrations(tmp_path / "empty", "csv_logs")
    with pytest.raises(ConfigError, match="csv_log' cannot be imported"):
        import_demonstrations(tmp_path / "logs", "csv_log:csv_logs")


@pytest.mark.usefixtures("own_importer")
@pytest.mark.usefixtures("empty_figures")
def test_the_script_knows_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "scripts"))
    from script_runs import run_script

    steps = write_logs(tmp_path / "logs")
    done = run_script(
        tmp_path, ROOT, "import_demos.py", "source=logs", "format=csv_logs:csv_logs", "out=store.zarr"
    )
    assert "Sound: ready for training." in done.stdout
    assert_same(read_demonstrations(tmp_path / "store.zarr"), steps)
