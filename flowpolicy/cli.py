"""What every script shares: compose a config, run a function on it, turn user errors into one sentence."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import hydra
    from filelock import FileLock, Timeout
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ImportError as missing:
    raise SystemExit(
        f"The scripts need '{missing.name}'; install it with: pip install 'flowpolicy[train]'."
    ) from missing

from flowpolicy.errors import FlowPolicyError
from flowpolicy.run_folder import claim, refuse_other_kind
from flowpolicy.settings import unknown_key

CONFIG_PACKAGE = "flowpolicy_configs"
Main = Callable[[dict[str, Any], Path], None]


def script(config_name: str) -> Callable[[Main], Callable[[], None]]:
    """Turn ``main(config, run_dir)`` into a program configured by ``configs/<config_name>.yaml``.

    ``main`` gets the resolved config as plain dictionaries and the run's folder. A mistake of the user's
    ends the program with one sentence on stderr and exit status 1; Ctrl-C with status 130.
    """

    def decorate(main: Main) -> Callable[[], None]:
        def job(config: DictConfig) -> None:
            run_dir = Path(HydraConfig.get().runtime.output_dir)
            try:
                with _refusing_company(run_dir):
                    refuse_other_kind(run_dir, config_name)
                    main(_plain(config), run_dir)
                    if _is_first():  # a later process of torchrun may have a folder of its own
                        claim(run_dir, config_name)
            except FlowPolicyError as error:
                _fail(str(error))
            except KeyboardInterrupt:
                _fail(f"Interrupted; what was finished is in {run_dir}.", status=130)
            finally:
                # Hydra made the folder. Empty, it says nothing: a refused command, or a later process of
                # torchrun whose clock had moved on to another name.
                with contextlib.suppress(OSError):
                    run_dir.rmdir()

        def program() -> None:
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it announces an optional module it lacks
            _refuse_bad_overrides(config_name)
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_PACKAGE}", config_name=config_name)(
                job
            )()

        return program

    return decorate


def composed(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """The resolved config of another script, from inside a running one."""
    try:
        return _plain(hydra.compose(config_name, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        base = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
        raise FlowPolicyError(_explained(str(error), base)) from error


def chosen(group: str) -> str:
    """The option of a config group that the running script was given, such as ``hopper`` of ``env``."""
    return str(HydraConfig.get().runtime.choices[group])


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other program is in this block with the same folder."""
    if not _is_first():  # of one torchrun, only the first process asks
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def _is_first() -> bool:
    """Whether this is the first process of a torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def _refusing_company(run_dir: Path) -> Iterator[None]:
    """Refuse a folder that another program is writing to; the processes of one torchrun share it."""
    if not _is_first():
        yield
        return
    lock = FileLock(run_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FlowPolicyError(
            f"Another program is writing to {run_dir}; wait for it, or choose another run_dir."
        ) from error
    except OSError as error:
        raise FlowPolicyError(f"{run_dir} cannot be written to: {error.strerror or error}.") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def command_line() -> str:
    """The command that started this program, as a user would type it."""
    program = Path(sys.argv[0])
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join(["python", str(program), *sys.argv[1:]])


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return plain
    except OmegaConfBaseException as error:
        missing = re.search(r"full_key: (\S+)", str(error))
        key = missing.group(1) if missing else "a setting"
        raise FlowPolicyError(f"'{key}' needs a value; add {key}=... to the command.") from error


def _refuse_bad_overrides(config_name: str) -> None:
    """Compose once beforehand, so that a misspelt override is one sentence and not Hydra's page."""
    words = [word for word in sys.argv[1:] if word not in ("--multirun", "-m")]
    if any(word.startswith("-") for word in words):  # Hydra's other flags (--help, ...): leave them to Hydra
        return
    is_sweep = len(words) < len(sys.argv) - 1
    with hydra.initialize_config_module(CONFIG_PACKAGE, version_base="1.3"):
        try:
            overrides = _first_of_sweeps(words) if is_sweep else words
            hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            base = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
            _fail(_explained(str(error), base))


def _first_of_sweeps(overrides: list[str]) -> list[str]:
    """The overrides of a sweep's first run."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [
        f"{item.get_key_element()}={next(item.sweep_string_iterator())}"
        if item.is_sweep_override()
        else str(item.input_line)
        for item in parsed
    ]


def _explained(message: str, base: Any) -> str:
    override = re.search(r"Could not override '([^']+)'", message)
    if override:
        return unknown_key(override.group(1), _dotted(base))
    several = re.search(r"Ambiguous value for argument '([^'=]+)=([^']+)'", message)
    if several:
        key, values = several.groups()
        return f"{key}={values} names several values; add --multirun to run each, or write {key}=[{values}]."
    group = re.search(
        r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\s+[\w-]+$)+)",
        message,
        re.MULTILINE,
    )
    if group:
        names = ", ".join(group.group(3).split())
        return f"There is no {group.group(1)} called '{group.group(2)}'; choose one of: {names}."
    return " ".join(message.split("\n\n")[0].split())


def _dotted(node: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys.extend(_dotted(value, f"{prefix}{key}."))
    return keys


def _fail(sentence: str, status: int = 1) -> None:
    print(sentence, file=sys.stderr)  # noqa: T201 - this is the one place that speaks to a user's terminal
    sys.stderr.flush()
    if os.environ.get("FLOWPOLICY_TRACEBACK"):
        logging.getLogger(__name__).exception("traceback, as FLOWPOLICY_TRACEBACK is set")
    raise SystemExit(status)
