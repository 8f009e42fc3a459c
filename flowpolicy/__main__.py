"""The ``flowpolicy`` command, ``python -m flowpolicy`` too; its sub-commands are the scripts."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from pathlib import Path

SCRIPTS = "flowpolicy_scripts"
_HELP = ("-h", "--help")


def main() -> None:
    """Run the sub-command that the command line names; the rest of the line is that script's.

    A name is written with hyphens or underscores, or as a word of it that stands in no other: ``control``.
    ``--help`` alone lists the sub-commands, and imports none.
    """
    if len(sys.argv) == 1 or sys.argv[1] in _HELP:
        print(_overview())  # noqa: T201 - a command speaks to its user
        raise SystemExit(0 if sys.argv[1:] else 2)
    if sys.argv[1] == "--version":
        from flowpolicy import __version__

        print(f"flowpolicy {__version__}")  # noqa: T201
        raise SystemExit(0)
    typed, *rest = sys.argv[1:]
    typed = _command(typed)
    program = "python -m flowpolicy" if Path(sys.argv[0]).name == "__main__.py" else "flowpolicy"
    sys.argv = [f"{program} {typed}", *rest]  # from here on, the program is the sub-command
    importlib.import_module(f"{SCRIPTS}.{typed.replace('-', '_')}").main()


def _command(typed: str) -> str:
    """The sub-command that is meant: as typed, or in full where a word stands for it."""
    known, name = [_as_typed(script) for script in _scripts()], _as_typed(typed)
    holding = [other for other in known if name in other]
    if name in known:
        return typed
    if len(holding) == 1 and name in holding[0].split("-"):
        return holding[0]
    having = [other for other in known if name in other.split("-")]
    near = having if len(having) > 1 else difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}."
    raise SystemExit(f"There is no sub-command '{typed}'; {hint}")


def _scripts() -> list[str]:
    folder = importlib.import_module(SCRIPTS).__path__
    return sorted(module.name for module in pkgutil.iter_modules(folder))


def _as_typed(name: str) -> str:
    return name.replace("_", "-")


def _overview() -> str:
    (folder,) = importlib.import_module(SCRIPTS).__path__
    names = _scripts()
    width = max(map(len, names))
    lines = [f"  {_as_typed(name):<{width}}  {_purpose(Path(folder) / f'{name}.py')}" for name in names]
    return "\n".join(
        [
            "Usage: flowpolicy COMMAND [setting=value ...]",
            "",
            "Flow policies for robots: pretrain on demonstrations, fine-tune online, deploy in real time.",
            "",
            *lines,
            "",
            "flowpolicy COMMAND --help shows a command's settings. A word that one name alone has stands for",
            "it: flowpolicy control.",
        ]
    )


def _purpose(script: Path) -> str:
    """The script's docstring up to its example; read, not imported."""
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("python scripts/")[0].rstrip(" `:\n")


if __name__ == "__main__":
    main()
