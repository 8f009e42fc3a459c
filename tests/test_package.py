"""A distribution holds the whole checkout under its installed names, and its commands are the scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flowpolicy
from flowpolicy.__main__ import _command, main

FOLDERS = {
    "flowpolicy": "flowpolicy",
    "envs": "flowpolicy_envs",
    "configs": "flowpolicy_configs",
    "scripts": "flowpolicy_scripts",
}


def test_every_module_and_data_file_is_packaged(repo_root: Path, tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=repo_root, capture_output=True, check=True)
    wanted = {
        f"{name}/{file.relative_to(repo_root / folder)}"
        for folder, name in FOLDERS.items()
        for file in (repo_root / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".sh"
    }
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == wanted


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """``typed(*words, program="flowpolicy") -> (exit status or sentence, what was printed)``"""

    def run(*words: str, program: str = "/somewhere/bin/flowpolicy"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return run


def test_the_overview_lists_every_script_with_its_purpose(typed, repo_root: Path) -> None:
    status, page = typed("--help")
    assert status == 0
    for script in (repo_root / "scripts").glob("[a-z]*.py"):
        (line,) = [line for line in page.splitlines() if line.split()[:1] == [script.stem.replace("_", "-")]]
        assert len(line.split(maxsplit=1)[1]) > 10
    assert typed()[0] == 2
    assert typed("--version") == (0, f"flowpolicy {flowpolicy.__version__}\n")


def test_the_overview_waits_for_no_heavy_import() -> None:
    code = "import sys; sys.argv = ['flowpolicy', '--help']\n"
    code += (
        "from flowpolicy.__main__ import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("word", "program", "shown"),
    [
        ("finetune-reinflow", "/bin/flowpolicy", "flowpolicy"),
        ("finetune_reinflow", "/x/__main__.py", "python -m flowpolicy"),
    ],
)
def test_a_command_is_its_script_in_both_spellings(typed, word: str, program: str, shown: str) -> None:
    pytest.importorskip("hydra", reason="hydra is not installed")
    status, page = typed(word, "--help", program=program)
    assert not status
    assert f"Usage: {shown} {word} [env=hopper]" in page


def test_an_unknown_command_names_the_nearest(typed) -> None:
    assert typed("pretrian", "env=hopper")[0] == "There is no sub-command 'pretrian'; did you mean pretrain?"
    assert typed("train")[0] == "There is no sub-command 'train'; did you mean pretrain?"
    meant = "finetune-offpolicy or finetune-preferences or finetune-reinflow or finetune-robot"
    assert typed("finetune")[0] == f"There is no sub-command 'finetune'; did you mean {meant}?"


@pytest.mark.parametrize(
    ("word", "name"),
    [("control", "run-control"), ("import", "import-demos"), ("reinflow", "finetune-reinflow")],
)
def test_a_word_stands_for_the_one_command_that_has_it(word: str, name: str) -> None:
    assert _command(word) == name


@pytest.mark.parametrize(
    ("program", "shown"),
    [("flowpolicy plan", "flowpolicy plan"), ("scripts/plan.py", "python scripts/plan.py")],
)
def test_the_recorded_command_is_the_typed_one(program: str, shown: str, monkeypatch) -> None:
    pytest.importorskip("hydra", reason="hydra is not installed")
    from flowpolicy.cli import command_line

    monkeypatch.setattr(sys, "argv", [program, "checkpoint=a b", "period_ms=4"])
    assert command_line() == f"{shown} 'checkpoint=a b' period_ms=4"
