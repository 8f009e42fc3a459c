"""What every script shares: compose a config, run a function on it, turn user errors into one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowpolicy import plugins
from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.evaluation.task import BESIDE_THE_TASK, Task, check_keys
from flowpolicy.optional import optional
from flowpolicy.runs.run_folder import claim, refuse_other_kind
from flowpolicy.settings import unknown_key

with optional("The scripts need {name}", "train", SystemExit):
    import hydra
    from filelock import FileLock, Timeout
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

CONFIG_PACKAGE = "flowpolicy_configs"
Main = Callable[[dict[str, Any], Path], None]
_plugin_words: list[str] = []  # of the command line, which Hydra does not see
_typed: dict[str, str] = {}  # words that Hydra sees in place of those that were typed: env=PATH


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
                sys.argv[1:] = [_adopted_task(word) for word in sys.argv[1:]]
            except FlowPolicyError as error:
                _fail(str(error))
            sys.argv[1:] = [part for word in sys.argv[1:] for part in _own_robot(word)]
            _quote_paths(config_name)
            _refuse_bad_overrides(config_name)
            hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_PACKAGE}", config_name=config_name)(
                job
            )()

        return program

    return decorate


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
    from flowpolicy.finetuning.rules import UPDATE_RULES
    from flowpolicy.flow import OBJECTIVES
    from flowpolicy.models.network import NETWORKS, network_class

    network_class("transformer")  # which has ours registered
    store = ConfigStore.instance().store
    for name, objective in OBJECTIVES.items():
        if _is_users(objective):
            store(name, {"name": name, **_defaults(objective)}, "policy")
    for name, rule in UPDATE_RULES.items():
        if _is_users(rule):
            store(name, {"name": name, **_defaults(rule)}, "update")
    for name, network in NETWORKS.items():
        if _is_users(network):
            store(name, {**_defaults(network.Config), "network": name}, "model")


def _adopted_task(word: str) -> str:
    """``env=PATH.yaml`` as a choice that Hydra finds, with the file's content; any other word as it is.

    In a sweep, commas separate several.
    """
    key, _, values = word.partition("=")
    is_sweep = any(flag in ("--multirun", "-m") for flag in sys.argv)
    paths = [path.strip("'\"") for path in (values.split(",") if is_sweep else [values])]
    if key.lstrip("+") != "env" or not any(path.endswith((".yaml", ".yml")) for path in paths):
        return word
    names = [_task_choice(Path(path)) if path.endswith((".yaml", ".yml")) else path for path in paths]
    adopted = f"{key}={','.join(names)}"
    _typed[adopted] = word
    return adopted


def _task_choice(path: Path) -> str:
    """The name under which Hydra finds the task in a file.

    Its ``demonstrations`` are looked for beside the file first, and then where one is.
    """
    path = path.expanduser()
    try:
        task = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no task file {path}; check env=, or name a task as env=hopper."
        ) from error
    except Exception as error:  # of the system, of YAML and of OmegaConf
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(f"{path} cannot be read as a task's YAML file: {reason}.") from error
    if not isinstance(task, DictConfig):
        raise ConfigError(f"{path} must hold a task's settings, key: value; see docs/add_your_own_task.md.")
    if "defaults" not in task:  # every setting is there, so that the command line can change it
        groups: dict[str, Any] = {key: {} if inside else None for key, inside in BESIDE_THE_TASK.items()}
        del groups["observation_keys"]  # left out means another thing than null
        given = set(task.keys())  # of which `in` denies those that are ???
        for key, default in {**_defaults(Task), **groups}.items():
            if key not in given:
                task[key] = default
    demonstrations = task.get("demonstrations")
    if isinstance(demonstrations, str) and (path.parent / demonstrations).exists():
        task.demonstrations = str(path.parent / demonstrations)
    stem = re.sub(r"[^\w-]+", "-", path.stem)
    name = f"{stem}-{zlib.crc32(str(path.resolve()).encode()):08x}"  # two files may have one name
    ConfigStore.instance().store(name, task, "env")
    return name


def _own_robot(word: str) -> list[str]:
    """``robot=module:name`` in full; any other word as it is."""
    is_own = re.fullmatch(r"robot=[A-Za-z_][\w.]*:[A-Za-z_]\w*", word)
    return ["robot=own", f"robot.kind={word.partition('=')[2]}"] if is_own else [word]


def _is_users(cls: type) -> bool:
    return not cls.__module__.startswith("flowpolicy.")


def _defaults(cls: Any) -> dict[str, Any]:
    """The settings of a dataclass that have a default."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            found[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            value: Any = item.default_factory()
            is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
            found[item.name] = dataclasses.asdict(value) if is_config else value
    return found


def _claim(run_dir: Path, config_name: str) -> None:
    if _is_first():  # a later process of torchrun may have a folder of its own
        claim(run_dir, config_name)


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
    words = [*_plugin_words, *(_typed.get(word, word) for word in sys.argv[1:])]
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


def _quote_paths(config_name: str) -> None:
    """Quote the values of the command line that Hydra would not read as the paths that they are."""
    words = sys.argv[1:]
    is_sweep = any(word in ("--multirun", "-m") for word in words)
    if [quoted_path(word, is_sweep=is_sweep) for word in words] == words:
        return
    with hydra.initialize_config_module(CONFIG_PACKAGE, version_base="1.3"):
        base = hydra.compose(config_name)
    sys.argv[1:] = [quoted_path(word, base, is_sweep=is_sweep) for word in words]


def quoted_path(word: str, base: DictConfig | None = None, *, is_sweep: bool = False) -> str:
    """An override ``key=value``, its value quoted where Hydra's grammar would not read it as one text.

    Parentheses, commas, brackets, spaces and others mean something in that grammar, and a path may hold them.
    Quoted is what the grammar cannot read, and what it reads as something else though it is a path: a file of
    that name exists or, outside of a sweep, it has a folder and no brackets around it. What the user quoted,
    and the values of settings that are lists, numbers or switches, stay as they are.

    Args:
        word: of the command line.
        base: the config before overrides; without one, any setting may be a text.
        is_sweep: commas separate the values of several runs.
    """
    key, equals, value = word.partition("=")
    if (
        not equals
        or not value
        or not re.fullmatch(r"(\+\+?)?[\w.]+", key)
        or (base is not None and not _takes_text(base, key.lstrip("+")))
    ):
        return word
    quoted = f"{key}={_quoted(value)}"
    try:
        parsed = OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):  # a '[' that a list does not follow, a '(' without a function
        return word if value[0] in "'\"[{" and not Path(value).exists() else quoted
    if isinstance(parsed.value(), str | QuotedString):
        return word
    is_path = Path(value).exists() or (parsed.is_sweep_override() and not is_sweep and "/" in value)
    return quoted if is_path else word


def _takes_text(base: DictConfig, key: str) -> bool:
    """Whether the config has a text at ``key``, or nothing that says what it takes."""
    try:
        value = OmegaConf.select(base, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return True
    return value is None or isinstance(value, str)


def _quoted(value: str) -> str:
    """``value`` in Hydra's quotes, where backslashes are doubled only before a quote and at the end."""
    inside = re.sub(r"(\\*)'", r"\1\1\\'", value)
    inside += "\\" * (len(inside) - len(inside.rstrip("\\")))
    return f"'{inside}'"


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
            unread = next((word for word in words if not _is_override(word)), None)
            if unread is not None:
                _fail(_how_to_write(unread))
            base = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
            _fail(_explained(str(error), base))


def _is_override(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):
        return False
    return True


def _how_to_write(word: str) -> str:
    """One sentence on a word of the command line that is no override."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"\S+", key):
        return f"'{word}' is no setting; write key=value, such as seed=1."
    return (
        f"The value of {word} cannot be read; a list is written {key}=[a,b], and text with brackets or "
        f'quotes in two pairs of quotes: "{key}={_quoted(value)}"'
    )


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
        own = ", or a file of your own: env=PATH.yaml" if group.group(1) == "env" else ""
        return f"There is no {group.group(1)} called '{group.group(2)}'; choose one of: {names}{own}."
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
