"""A served policy in the control loop: requests go to the server, and chunks come back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from flowpolicy.control.inference_hosts import Build, Request
from flowpolicy.control.robot import Robot, RobotError, RobotSpec
from flowpolicy.control.served import PolicyServer
from flowpolicy.errors import ConfigError, TaskError
from flowpolicy.features import Feature, TextFeature, features_of
from flowpolicy.serving.client import PolicyClient
from flowpolicy.serving.config import token_of
from flowpolicy.spec import PolicySpec

FIRST_OBSERVATION_S = 10.0
"""For the robot to give an observation, from which the server samples a first chunk."""
NEXT_CONNECTION_S = 0.3
"""For a server that went away to take a new connection, until the request fails: less than a loop takes for a
hanging process."""
_UNKNOWN = PolicySpec({}, 1, 1, 1, 1)


class RemotePolicy:
    """A connection to a policy server.

    A server of this package describes its policy; one of openpi's does not: its policy is then taken to
    observe one step of what the robot observes.

    Args:
        config: its address, and what it does not say.

    Raises:
        ConfigError: the address is none, or the token is not the server's.
        ServerUnreachableError: no policy server answers there.
    """

    def __init__(self, config: PolicyServer) -> None:
        self.config = config
        self._client = _connected(config, _UNKNOWN)
        self._is_adopted = False

    @property
    def policy(self) -> PolicyClient | None:
        """See :class:`~flowpolicy.control.served.ServedPolicy`."""
        return self._client if self._client.is_described or self._is_adopted else None

    def adopt(self, robot: Robot) -> PolicyClient:
        """See :class:`~flowpolicy.control.served.ServedPolicy`.

        Raises:
            TaskError: the robot gives no observation, or the chunk does not fit it.
            FlowPolicyError: the server refuses the observation.
        """
        spec = robot.spec
        features = _features(spec)
        observation = {key: np.asarray(value)[None] for key, value in _first(robot, features).items()}
        request = _as_server(observation, self.config)
        actions = np.asarray(self._client.ask(request).get("actions"))
        if actions.ndim != 2 or actions.shape[1] != spec.action_dim:
            raise TaskError(
                f"{self.config.url} answers with actions of shape {actions.shape}; {spec.name} takes chunks "
                f"of {spec.action_dim} numbers a step."
            )
        horizon = len(actions)
        execute = self.config.execute_horizon or max(horizon // 2, 1)
        if execute > horizon:
            raise ConfigError(
                f"policy_server.execute_horizon is {execute}; it must be at most {horizon}, the length of a "
                "chunk."
            )
        self._client.spec = PolicySpec(features, 1, horizon, execute, spec.action_dim, name="remote")
        self._is_adopted = True
        return self._client

    def builder(self) -> Build:
        """See :class:`~flowpolicy.control.served.ServedPolicy`."""
        return RemoteBuilder(self.config, None if self._client.is_described else self._client.spec)

    def close(self) -> None:
        """See :class:`~flowpolicy.control.served.ServedPolicy`."""
        self._client.close()


@dataclass(frozen=True)
class RemoteBuilder:
    """Connects to a policy server where chunks are sampled.

    Attributes:
        config: the server.
        adopted: the policy's spec, where the server does not say it.
    """

    config: PolicyServer
    adopted: PolicySpec | None

    def __call__(self) -> RemoteInference:
        """The function from request to chunk."""
        client = _connected(self.config, self.adopted or _UNKNOWN)
        client.connect_timeout = NEXT_CONNECTION_S
        return RemoteInference(client, self.config)


class RemoteInference:
    """Asks a policy server for the chunk of each request.

    Args:
        client: connected.
        config: how to ask.
    """

    def __init__(self, client: PolicyClient, config: PolicyServer) -> None:
        self._client, self._config = client, config

    def __call__(self, request: Request) -> NDArray[np.float32]:
        """The chunk ``(T, A)``.

        Raises:
            FlowPolicyError: the server refuses, or went away; the next request connects again.
        """
        if self._client.is_described:
            observation: dict[str, Any] = dict(request.observation)
            if self._config.prompt is not None:  # in place of the robot's own words
                features = self._client.spec.features
                texts = [key for key, feature in features.items() if isinstance(feature, TextFeature)]
                observation = {key: each for key, each in observation.items() if key not in texts}
                observation["prompt"] = self._config.prompt
        else:
            observation = _as_server(request.observation, self._config)
        return np.asarray(self._client.infer(observation)["actions"], np.float32)

    def close(self) -> None:
        """End the connection."""
        self._client.close()


def _as_server(observation: Mapping[str, NDArray[Any]], config: PolicyServer) -> dict[str, Any]:
    """The newest step of an observation by the server's names, with the prompt."""
    newest = {key: rows[-1] for key, rows in observation.items()}
    names = config.observations if config.observations is not None else {key: key for key in newest}
    request = _named(names, newest, "policy_server.observations")
    if config.prompt is not None:
        request["prompt"] = config.prompt
    return request


def _named(names: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, own in names.items():
        if isinstance(own, Mapping):
            found[key] = _named(own, values, f"{where}.{key}")
        elif own in values:
            found[key] = values[own]
        else:
            raise ConfigError(f"{where}.{key} is {own!r}; the robot observes {', '.join(sorted(values))}.")
    return found


def _features(spec: RobotSpec) -> dict[str, Feature]:
    given = spec.observation_shapes
    features = features_of({key: tuple(each) for key, each in given.items() if not isinstance(each, Feature)})
    return {key: each if isinstance(each, Feature) else features[key] for key, each in given.items()}


def _first(robot: Robot, features: Mapping[str, Feature]) -> dict[str, Any]:
    """The robot's first complete observation."""
    until, why = time.monotonic() + FIRST_OBSERVATION_S, "it observes nothing"
    while time.monotonic() < until:
        try:
            found = robot.observe()
        except RobotError as error:
            found, why = {}, str(error)
        if features.keys() <= found.keys():
            return {key: feature.array(found[key]) for key, feature in features.items()}
        time.sleep(0.02)
    raise TaskError(f"{robot.spec.name} gave no observation within {FIRST_OBSERVATION_S:g} s ({why}).")


def _connected(config: PolicyServer, spec: PolicySpec) -> PolicyClient:
    try:
        parts = urlsplit(config.url if "//" in config.url else f"ws://{config.url}")
        host, port = parts.hostname, parts.port or 8000
    except ValueError as error:
        raise ConfigError(f"policy_server.url={config.url} is no address ({error}).") from error
    if parts.scheme != "ws" or not host or parts.path.strip("/"):
        raise ConfigError(
            f"policy_server.url={config.url} is no address of a policy server; give ws://HOST:PORT (for one "
            "behind TLS, the near end of an SSH tunnel)."
        )
    token = token_of(None if config.token_file is None else Path(config.token_file))
    return PolicyClient(host, port, token, timeout=config.timeout_s, spec=spec)
