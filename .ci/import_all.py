"""Import every module of the installed distribution; only what an extra brings may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata

OURS = ("flowpolicy", "flowpolicy_configs", "flowpolicy_envs", "flowpolicy_scripts")
WITH_AN_EXTRA = {  # what may fail to import with the core dependencies alone, and the extra it then asks for
    "flowpolicy.cli": "train",
    "flowpolicy.overrides": "train",
    "flowpolicy.evaluation.environment": "mujoco",
    "flowpolicy.serving": "serve",
    "flowpolicy.control.finetuning": "rl",
    "flowpolicy.finetuning": "rl",
    "flowpolicy_envs": "mujoco",
    "flowpolicy_scripts": "train",
}


def modules() -> list[str]:
    """Names of the modules that the installed distribution holds."""
    files = importlib.metadata.files("flowpolicy") or []
    names = [file.with_suffix("").parts for file in files if file.suffix == ".py"]
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names)


def missing_module(error: BaseException | None) -> str | None:
    """The module whose absence is behind ``error``."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return error.name if error is not None else None


def main() -> None:
    """Import each, and say how many did."""
    imported, waiting = [], []
    for name in modules():
        try:
            importlib.import_module(name)
            imported.append(name)
        except (ImportError, SystemExit) as error:
            missing = missing_module(error)
            may_fail = any(name == part or name.startswith(f"{part}.") for part in WITH_AN_EXTRA)
            if not may_fail or missing is None or missing.partition(".")[0] in OURS:
                raise SystemExit(f"{name} cannot be imported: {error}") from error
            waiting.append(f"{name} ({missing})")
    print(f"{len(imported)} modules imported; {len(waiting)} need an extra: {', '.join(waiting)}")
    if not imported:
        raise SystemExit("The distribution holds no module.")


main()
