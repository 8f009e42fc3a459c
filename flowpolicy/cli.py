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
from typing import TYPE_CHECKING, Any

from flowpolicy import plugins
from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.task import check_keys
from flowpolicy.optional import optional
from flowpolicy.overrides import (
    CONFIG_PACKAGE,
    adopted_task,
    compose_or_refuse,
    explained,
    is_left_to_hydra,
    own_robot,
    quote_paths,
    typed,
)
from flowpolicy.runs.run_folder import claim, refuse_other_kind
from flowpolicy.settings import defaults

if TYPE_CHECKING:
    from flowpolicy.control.run import ControlRun

with optional("The scripts need {name}", "train", SystemExit):
    import hydra
    from filelock import FileLock, Timeout
    from hydra._internal.callbacks import Callbacks
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import run_job
    from hydra.errors import HydraException
    from hydra.types import HydraContext
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

Main = Callable[[dict[str, Any], Path], None]
_plugin_words: list[str] = []  # of the command line, which Hydra does not see


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
                    try:
                        main(_plain(config), run_dir)
                    except SystemExit:  # it has ended by itself, with a status of its own
                        _claim(run_dir, config_name)
                        raise
                    _claim(run_dir, config_name)
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
            try:
                _adopt_plugins()
                sys.argv[1:] = [adopted_task(word) for word in sys.argv[1:]]
                sys.argv[1:] = [part for word in sys.argv[1:] for part in own_robot(word)]
                with hydra.initialize_config_module(CONFIG_PACKAGE, config_name, version_base="1.3"):
                    quote_paths(config_name)
                    config = compose_or_refuse(config_name)
                    if config is not None and not is_left_to_hydra():
                        _run(job, config)
                        return
            except FlowPolicyError as error:
                _fail(str(error))
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_PACKAGE}", config_name=config_name)(
                job
            )()

        return program

    return decorate


def _run(job: Callable[[DictConfig], None], config: DictConfig) -> None:
    """As ``hydra.main`` runs a job, which would compose the config twice more before it."""
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(config))
    _ = run_job(job, config, "hydra.run.dir", None, context).return_value  # it raises what the job raised


def _adopt_plugins() -> None:
    """Import what ``plugins=`` names; objectives and networks that it registers can be chosen like ours."""
    _plugin_words[:] = [word for word in sys.argv[1:] if word.startswith("plugins=")]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in _plugin_words]
    names = [
        name for word in _plugin_words for name in re.split(r"[\[\], ]+", word.partition("=")[2]) if name
    ]
    if not names and plugins.VARIABLE not in os.environ:
        return
    plugins.load(names)
    from flowpolicy.distillation.methods import METHODS
    from flowpolicy.finetuning.advantage_registry import ADVANTAGES
    from flowpolicy.finetuning.rules import UPDATE_RULES
    from flowpolicy.flow import OBJECTIVES
    from flowpolicy.models.network import NETWORKS, network_class
    from flowpolicy.preferences.losses import LOSSES

    network_class("transformer")  # which has ours registered
    store = ConfigStore.instance().store
    registries: dict[str, Any] = {
        "policy": OBJECTIVES, "method": METHODS, "loss": LOSSES, "update": UPDATE_RULES,
        "advantages": ADVANTAGES,
    }  # fmt: skip
    with contextlib.suppress(ImportError):  # without what off-policy fine-tuning needs, which it says itself
        from flowpolicy.finetuning.offpolicy.algorithms import ALGORITHMS

        registries["algorithm"] = ALGORITHMS
    for group, registry in registries.items():
        for name, part in registry.items():
            if _is_users(part):
                store(name, {"name": name, **defaults(part)}, group)
    for name, network in NETWORKS.items():
        if _is_users(network):
            store(name, {**defaults(network.Config), "network": name}, "model")


def _is_users(cls: type) -> bool:
    return not cls.__module__.startswith("flowpolicy.")


def _claim(run_dir: Path, config_name: str) -> None:
    if _is_first():  # a later process of torchrun may have a folder of its own
        claim(run_dir, config_name)


def composed(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """The resolved config of another script, from inside a running one."""
    try:
        return _plain(hydra.compose(config_name, overrides=overrides))
    except (HydraException, OmegaConfBaseException) as error:
        base = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
        raise FlowPolicyError(explained(str(error), base)) from error


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


def conclude(run: ControlRun, result: Path) -> None:
    """Print what a control run found and where its files and its result are; exit as its signal says."""
    for line in (run.table(), *run.files, result):
        print(line)  # noqa: T201
    if run.signal:
        raise SystemExit(128 + run.signal)


def command_line() -> str:
    """The command that started this program, as a user would type it."""
    words = [*_plugin_words, *(typed.get(word, word) for word in sys.argv[1:])]
    return " ".join([_program(), *map(shlex.quote, words)])


def _program() -> str:
    """How this program is started: ``python scripts/plan.py``, or ``flowpolicy plan``."""
    program = Path(sys.argv[0])
    if program.suffix != ".py":  # the command has put its own name and the sub-command's here
        return sys.argv[0]
    if program.is_absolute() and program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return shlex.join(["python", str(program)])


# The help pages in configs/ say ${program:}.
OmegaConf.register_new_resolver("program", _program, replace=True)


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        missing = re.search(r"full_key: (\S+)", str(error))
        key = missing.group(1) if missing else "a setting"
        raise FlowPolicyError(f"'{key}' needs a value; add {key}=... to the command.") from error
    if isinstance(plain.get("env"), dict):
        check_keys(plain["env"])
    return plain


def _fail(sentence: str, status: int = 1) -> None:
    print(sentence, file=sys.stderr)  # noqa: T201 - this is the one place that speaks to a user's terminal
    sys.stderr.flush()
    if os.environ.get("FLOWPOLICY_TRACEBACK"):
        logging.getLogger(__name__).exception("traceback, as FLOWPOLICY_TRACEBACK is set")
    raise SystemExit(status)
