import re
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from flowpolicy.errors import ConfigError
from flowpolicy.pretraining.config import DataConfig, TrainConfig
from flowpolicy.ranges import Allowed, PositiveInt, at_most, between, not_empty, one_of, positive_to, within
from flowpolicy.settings import Settings, build, choose, require


@dataclass(frozen=True)
class Inner:
    width: int = 4


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    rate: float = 1.0
    steps: int = 3
    flag: bool = False
    path: str | None = None
    other: Inner | None = None
    sizes: tuple[int, ...] = (1, 2)
    extra: dict[str, Any] = field(default_factory=dict)


GIVEN = {"name": "a", "inner": {"width": 8}}


def test_values_of_a_yaml_file_become_the_declared_types():
    built = build(Outer, {**GIVEN, "rate": 2, "sizes": [3, 4], "path": None}, "run")
    assert built == Outer("a", Inner(8), rate=2.0, sizes=(3, 4))
    assert isinstance(built.rate, float)
    assert build(Outer, {**GIVEN, "rate": "1e-4"}, "run").rate == 1e-4  # YAML 1.1 reads that as a string
    assert build(Outer, {"name": "a", "inner": Inner(2), "path": "x"}, "run").inner.width == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ratte": 1.0}, r"'run.ratte'; did you mean 'run.rate'\?"),
        ({"inner": {"widht": 1}}, r"did you mean 'run.inner.width'\?"),
        ({"q" * 40: 1}, r"valid keys: .*run.name"),
        ({"steps": 1.5}, r"run.steps is 1.5; it must be of type int"),
        ({"steps": True}, "run.steps is True; it must be an integer"),
        ({"steps": "many"}, "run.steps"),
        ({"rate": "fast"}, "run.rate is 'fast'; it must be a number"),
        ({"rate": True}, "run.rate"),
        ({"flag": 1}, "run.flag"),
        ({"flag": "yes"}, "run.flag"),
        ({"name": None}, "run.name"),
        ({"path": 3}, "run.path is 3; it must be of type str"),
        ({"other": {"width": "x"}}, "run.other.width is 'x'; it must be of type int"),
        ({"sizes": 3}, "run.sizes"),
        ({"sizes": [1, "b"]}, r"run.sizes\[1\] is 'b'; it must be of type int"),
        ({"inner": 3}, "run.inner"),
        ({"extra": [1]}, "run.extra"),
    ],
)
def test_mistakes_are_named_with_their_place(values, words):
    with pytest.raises(ConfigError, match=words) as refused:
        build(Outer, {**GIVEN, **values}, "run")
    assert "\n" not in str(refused.value)


def test_the_top_level_has_no_prefix():
    with pytest.raises(ConfigError, match=r"^steps is 'many'"):
        build(Outer, {**GIVEN, "steps": "many"}, "")
    with pytest.raises(ConfigError, match=r"^inner.width is 'wide'"):
        build(Outer, {**GIVEN, "inner": {"width": "wide"}}, "")


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"run.inner is missing"):
        build(Outer, {"name": "a"}, "run")


def test_choices_and_requirements():
    assert choose({"euler": 1}, "euler", "solver") == 1
    with pytest.raises(
        ConfigError, match=r"solver is 'eulr' \(did you mean 'euler'\?\); choose one of euler, heun"
    ):
        choose({"heun": 2, "euler": 1}, "eulr", "solver")
    require(True, "x", 1, "positive")
    with pytest.raises(ConfigError, match="x is -1; it must be positive"):
        require(False, "x", -1, "positive")


@pytest.mark.parametrize(
    ("cls", "values", "words"),
    [
        (TrainConfig, {"steps": 0}, "train.steps is 0; it must be at least 1"),
        (TrainConfig, {"batch_size": -1}, "at least 1"),
        (TrainConfig, {"learning_rate": 0.0}, "positive"),
        (TrainConfig, {"final_learning_rate": 1.5}, r"\[0, 1\]"),
        (TrainConfig, {"ema_decay": 1.0}, r"\[0, 1\)"),
        (TrainConfig, {"precision": "fp8"}, "auto, float32 or bfloat16"),
        (TrainConfig, {"loggers": ["cvs"]}, "csv, tensorboard, wandb"),
        (TrainConfig, {"warmup_steps": -5}, "at least 0"),
        (TrainConfig, {"gradient_clip": 0.0}, "positive"),
        (DataConfig, {"validation_fraction": 1.0}, r"\[0, 1\)"),
        (DataConfig, {"action_normalization": "zscore"}, "minmax, gaussian, quantile, none"),
        (DataConfig, {"observation_keys": []}, "at least one key"),
        (DataConfig, {"max_episodes": 0}, "at least 1"),
        (DataConfig, {"action_clip": 0.0}, "positive"),
    ],
)
def test_ranges_of_the_training_settings(cls, values, words):
    with pytest.raises(ConfigError, match=words):
        build(cls, values, "train")


Even = Annotated[int, Allowed(lambda value: value % 2 == 0, "even")]


@dataclass(frozen=True)
class Declared(Settings, prefix="own"):
    count: PositiveInt = 1
    limit: Annotated[PositiveInt, at_most(8)] | None = None
    share: Annotated[float, within("(0, 1]")] = 1.0
    rate: Annotated[float, between(1, 1000)] = 50.0
    sizes: Annotated[tuple[Even, ...], not_empty("size")] = (2,)
    mode: Annotated[str, one_of(("fast", "safe", "slow"))] = "fast"


@dataclass(frozen=True)
class Derived(Declared):
    scale: Annotated[float, positive_to(10)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.limit != self.count, "own.limit", self.limit, "another number than own.count")


@pytest.mark.parametrize("cls", [Declared, Derived])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "own.count is 0; it must be at least 1."),
        ({"limit": 0}, "own.limit is 0; it must be at least 1."),
        ({"limit": 9}, "own.limit is 9; it must be at most 8."),
        ({"share": 0.0}, "own.share is 0.0; it must be in (0, 1]."),
        ({"share": 1.5}, "own.share is 1.5; it must be in (0, 1]."),
        ({"share": float("nan")}, "own.share is nan; it must be in (0, 1]."),
        ({"rate": 1001.0}, "own.rate is 1001.0; it must be between 1 and 1000."),
        ({"sizes": ()}, "own.sizes is (); it must be at least one size."),
        ({"sizes": (2, 3)}, "own.sizes is 3; it must be even."),
        ({"mode": "idle"}, "own.mode is 'idle'; it must be one of fast, safe, slow."),
    ],
)
def test_what_fields_declare_is_checked_at_construction(cls, values, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        cls(**values)


def test_declared_ranges_hold_their_ends_and_none():
    assert Declared(count=1, limit=8, share=1.0, rate=1000.0, sizes=(2, 4), mode="slow").limit == 8
    assert Declared().limit is None


@pytest.mark.parametrize("values", [{"scale": 0.0}, {"scale": 11.0}, {"count": 3, "limit": 3}])
def test_a_subclass_adds_ranges_and_relations(values):
    with pytest.raises(ConfigError, match=r"^own\."):
        Derived(**values)
    assert Derived(scale=10.0).scale == 10.0
