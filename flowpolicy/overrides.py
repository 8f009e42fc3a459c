"""The words of a command line as Hydra reads them: tasks from files, paths as text, mistakes in words."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path
from typing import Any

from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.task import BESIDE_THE_TASK, Task
from flowpolicy.optional import optional
from flowpolicy.settings import defaults, unknown_key

with optional("The scripts need {name}", "train", SystemExit):
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

CONFIG_PACKAGE = "flowpolicy_configs"
typed: dict[str, str] = {}
"""Words that Hydra sees -> those that were typed in their place, such as ``env=PATH``."""


def adopted_task(word: str) -> str:
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
    typed[adopted] = word
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
        for key, default in {**defaults(Task), **groups}.items():
            if key not in given:
                task[key] = default
    demonstrations = task.get("demonstrations")
    if isinstance(demonstrations, str) and (path.parent / demonstrations).exists():
        task.demonstrations = str(path.parent / demonstrations)
    stem = re.sub(r"[^\w-]+", "-", path.stem)
    name = f"{stem}-{zlib.crc32(str(path.resolve()).encode()):08x}"  # two files may have one name
    ConfigStore.instance().store(name, task, "env")
    return name


def own_robot(word: str) -> list[str]:
    """``robot=module:name`` in full; any other word as it is."""
    is_own = re.fullmatch(r"robot=[A-Za-z_][\w.]*:[A-Za-z_]\w*", word)
    return ["robot=own", f"robot.kind={word.partition('=')[2]}"] if is_own else [word]


def quote_paths(config_name: str) -> None:
    """Quote the values of the command line that Hydra would not read as the paths that they are.

    Hydra must be initialised.
    """
    words = sys.argv[1:]
    is_sweep = any(word in ("--multirun", "-m") for word in words)
    if [quoted_path(word, is_sweep=is_sweep) for word in words] == words:
        return
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


def is_left_to_hydra() -> bool:
    """Whether the command line sweeps, or talks to Hydra itself: ``--help``, ``hydra.verbose=true``."""
    return any(word.startswith(("-", "hydra")) for word in sys.argv[1:])


def compose_or_refuse(config_name: str) -> DictConfig | None:
    """The config that the command line asks for, of a sweep the first; a misspelt override is one sentence.

    None where Hydra's own flags say what is wanted. Hydra must be initialised.
    """
    words = [word for word in sys.argv[1:] if word not in ("--multirun", "-m")]
    if any(word.startswith("-") for word in words):
        return None
    is_sweep = len(words) < len(sys.argv) - 1
    try:
        overrides = _first_of_sweeps(words) if is_sweep else words
        return hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        if _marked_as_new(str(error)):
            return compose_or_refuse(config_name)
        unread = next((word for word in words if not _is_override(word)), None)
        if unread is not None:
            raise ConfigError(_how_to_write(unread)) from error
        base = OmegaConf.to_container(hydra.compose(config_name), resolve=False)
        raise ConfigError(explained(str(error), base)) from error


def _marked_as_new(message: str) -> bool:
    """Put a + before the override that Hydra refuses, where a task may have what it names though its file
    does not: any keyword of the environment, and a setting with a default. Whether it was one.
    """
    known = "|".join(("env_kwargs\\..+", *defaults(Task)))
    found = re.search(rf"Could not override '(env\.(?:{known}))'\.", message)
    places = [at for at, word in enumerate(sys.argv) if found and word.startswith(f"{found[1]}=")]
    for at in places:
        typed[f"+{sys.argv[at]}"] = sys.argv[at]
        sys.argv[at] = f"+{sys.argv[at]}"
    return bool(places)


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


def explained(message: str, base: Any) -> str:
    """What Hydra refuses, in one sentence; ``base`` is the config before overrides."""
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
