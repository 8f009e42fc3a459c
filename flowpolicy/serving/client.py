"""The client of a policy server, which stands in for a policy of this process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.features import Feature, features_of
from flowpolicy.policy.action_space import ActionConfig
from flowpolicy.serving.messages import MessageError, decode, encode
from flowpolicy.settings import build, require
from flowpolicy.spec import PolicySpec

MAX_MESSAGE_BYTES = 2**26
"""Of an answer; a chunk has kilobytes."""

_SIZES = ("obs_horizon", "action_horizon", "execute_horizon", "action_dim", "nfe")
"""Numbers of the metadata; all but the last stay as they are when the server is another."""


class ServerUnreachableError(FlowPolicyError):
    """No server answers, or the connection is lost; the next request connects again."""


class PolicyClient:
    """Asks a policy server for action chunks; it acts as the policy does, in evaluation and control.

    The connection is kept. Where it breaks, the request under way raises one
    :class:`ServerUnreachableError` and is not repeated: its observation is old by then. The next request
    connects again, waiting for the server up to ``connect_timeout``. One thread has its turn at a time.

    >>> with PolicyClient(port=8000) as policy:  # doctest: +SKIP
    ...     actions = policy.infer({"observation": observation})["actions"]  # (T, A)

    Args:
        host: of the server.
        port: of the server.
        token: of the server, where it has one.
        timeout: seconds until an answer must have come.
        connect_timeout: seconds in which a server must be reached.
        spec: of the policy, where the server does not describe it, as openpi's own does not; None refuses
            such a server.

    Attributes:
        metadata: what the server says of its policy.
        is_described: whether it says what the policy observes and gives.
        spec: observations and actions of the served policy.
        device: where chunks arrive.

    Raises:
        ServerUnreachableError: no policy server answers there.
        ConfigError: the token is not the server's.
    """

    spec: PolicySpec
    device = torch.device("cpu")

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, *,
        timeout: float = 5.0, connect_timeout: float = 10.0, spec: PolicySpec | None = None,
    ) -> None:  # fmt: skip
        require(timeout > 0, "timeout", timeout, "positive")
        require(connect_timeout > 0, "connect_timeout", connect_timeout, "positive")
        self.host, self.port, self._token = host, port, token
        self.timeout, self.connect_timeout = timeout, connect_timeout
        self.metadata: dict[str, Any] = {}
        self.is_described = False
        if spec is not None:
            self.spec = spec
        self._accepts_any = spec is not None
        self._connection: ClientConnection | None = None
        self._socket: socket.socket | None = None
        self._turn = threading.Lock()
        with self._turn:
            self._connect()

    @property
    def address(self) -> str:
        """Host and port, as in an address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations of one chunk."""
        self._check_sampling(num_steps, solver)
        return int(self.metadata.get("nfe", 1))

    def infer(self, observation: Mapping[str, Any] | NDArray[Any]) -> dict[str, Any]:
        """Ask for a chunk, as openpi's client does.

        Args:
            observation: key -> ``(T_o, *shape)``, ``shape`` where T_o = 1, or ``(B, T_o, *shape)``, and
                ``noise`` where x_0 is given; a plain array stands for the key ``observation``.

        Returns:
            ``actions``, ``(T, A)`` or ``(B, T, A)`` float32, and milliseconds in ``server_timing`` and
            ``policy_timing``.

        Raises:
            FlowPolicyError: the server refuses the observation; the connection stays.
            ServerUnreachableError: it went away, or did not answer in time.
        """
        if not isinstance(observation, Mapping):
            observation = {"observation": observation}
        content = self.ask(observation)
        actions = content.get("actions")
        if not isinstance(actions, np.ndarray) or actions.shape[-2:] != self.spec.chunk_shape:
            raise MessageError(f"The server at {self.address} answered without a chunk of actions.")
        return content

    def ask(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer to a request, whatever it holds; otherwise as :meth:`infer`.

        Raises:
            FlowPolicyError: as :meth:`infer`.
        """
        message = encode(_as_arrays(observation))
        with self._turn:
            answer = self._exchange(message)
        if isinstance(answer, str):  # openpi's servers send a traceback
            lines = answer.strip().splitlines() or ["no reason"]
            is_traceback = lines[0].startswith("Traceback")
            raise FlowPolicyError(f"The server refuses: {_shown(lines[-1])}." if is_traceback else answer)
        content = decode(answer)
        if not isinstance(content, dict):
            raise MessageError(f"The server at {self.address} answered without a map.")
        return dict(content)

    def act(
        self, observations: Mapping[str, Any] | Any, *, num_steps: int | None = None,
        solver: str | None = None, noise: Tensor | None = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`FlowPolicy.act <flowpolicy.policy.FlowPolicy.act>`: ``(B, T_o, *shape)`` per key to
        ``(B, T, A)``; without ``noise`` and ``generator`` the server draws x_0.

        Raises:
            ConfigError: a K or solver that the server's policy was not built for.
            FlowPolicyError: as :meth:`infer`.
        """
        self._check_sampling(num_steps, solver)
        if not isinstance(observations, Mapping):
            observations = {"observation": observations}
        request = {key: _as_array(observations[key]) for key in self.spec.features if key in observations}
        if noise is None and generator is not None:
            rows = max((len(value) for value in request.values() if not isinstance(value, str)), default=1)
            shape = (rows, *self.spec.noise_shape)
            noise = torch.randn(shape, generator=generator, device=generator.device)
        if noise is not None:
            request["noise"] = _as_array(noise)
        return torch.from_numpy(self.infer(request)["actions"])

    def close(self) -> None:
        """End the connection; a second call does nothing."""
        with self._turn:
            if self._connection is not None:
                with contextlib.suppress(WebSocketException, OSError):
                    self._connection.close()
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_sampling(self, num_steps: int | None, solver: str | None) -> None:
        for name, asked in (("num_steps", num_steps), ("solver", solver)):
            served = self.metadata["sampling"].get(name)
            if asked is not None and asked != served:
                raise ConfigError(f"The server samples with {name}={served}, not {asked}; start another one.")

    def _exchange(self, message: bytes) -> bytes | str:
        if self._connection is None:
            self._connect()
        assert self._connection is not None
        try:
            self._connection.send(message)
            answer = self._connection.recv(self.timeout)
        except BaseException as error:  # after Ctrl-C too: the answer would be taken for the next one's
            self._drop()
            if isinstance(error, TimeoutError):
                what = f"gave no answer in {self.timeout:g} s"
            elif isinstance(error, (WebSocketException, OSError, EOFError, AssertionError)):
                what = f"ended the connection ({_line(error)})"
            else:
                raise
            raise ServerUnreachableError(
                f"The server at {self.address} {what}; the next request connects again."
            ) from error
        return answer if isinstance(answer, str) else bytes(answer)

    def _connect(self) -> None:
        """Connect within ``connect_timeout``, trying again while nobody listens or the server is full."""
        deadline, pause = time.monotonic() + self.connect_timeout, 0.02
        while True:
            failure: Exception
            try:
                metadata = self._open(max(deadline - time.monotonic(), 0.001))
                break
            except InvalidStatus as error:
                if error.response.status_code == 401:
                    reason = bytes(error.response.body or b"").decode(errors="replace").strip()
                    raise ConfigError(f"The server at {self.address} refuses: {_shown(reason)}.") from error
                if error.response.status_code < 500:
                    raise self._other_server(error) from error
                failure = error
            except InvalidHandshake as error:
                # One that ended the connection may be about to restart; what else it said will not change.
                if not isinstance(error.__cause__, (EOFError, OSError)):
                    raise self._other_server(error.__cause__ or error) from error
                failure = error
            except (OSError, EOFError, WebSocketException) as error:
                failure = error
            if time.monotonic() + pause >= deadline:
                raise ServerUnreachableError(
                    f"No policy server at {self.address} within {self.connect_timeout:g} s "
                    f"({_line(failure)}); start one with flowpolicy serve."
                ) from failure
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        self._take(metadata)

    def _open(self, seconds: float) -> Any:
        """Connect once; the metadata."""
        try:
            # A socket of our own: the library would take a web proxy of the environment.
            self._socket = socket.create_connection((self.host, self.port), seconds)
            self._socket.settimeout(None)  # silence between requests is no error
            if os.name == "posix":  # but a server that takes no data must not block a request for ever
                limit = struct.pack("@ll", int(self.timeout), int(self.timeout % 1 * 1e6))
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            self._connection = connect(
                f"ws://{self.address}", sock=self._socket, compression=None, open_timeout=seconds,
                close_timeout=1.0, max_size=MAX_MESSAGE_BYTES,
                additional_headers={"Authorization": f"Api-Key {self._token}"} if self._token else None,
            )  # fmt: skip
            message = self._connection.recv(seconds)
            if isinstance(message, str):
                raise self._other_server(f"it says: {message}")
            return decode(message)
        except BaseException as error:
            self._drop()
            if isinstance(error, MessageError):
                raise self._other_server(error) from error
            # The library takes for granted that a server does not speak before it is asked.
            if isinstance(error, (AssertionError, RuntimeError, ValueError)):
                raise self._other_server("it speaks another protocol") from error
            raise

    def _take(self, metadata: Any) -> None:
        """Keep the metadata; after a reconnection it must describe the same observations and actions."""
        try:
            spec = _spec_of(metadata)
        except ConfigError as error:
            if self._accepts_any and isinstance(metadata, dict) and not self.is_described:
                self.metadata = {"sampling": {}, **metadata}
                return
            self._drop()
            raise ServerUnreachableError(
                f"The server at {self.address} does not describe its policy ({_line(error)}); it is none of "
                "flowpolicy's, or needs a plugin or a version that this client has not."
            ) from error
        fixed = ("features", *_SIZES[:-1], "noise_dim")
        changed = [
            key for key in fixed if self.is_described and getattr(spec, key) != getattr(self.spec, key)
        ]
        if changed:
            self._drop()
            what = "observations" if changed[0] == "features" else changed[0]
            raise ServerUnreachableError(
                f"The server at {self.address} now has a policy of another {what}; make a new client for it."
            )
        metadata.setdefault("sampling", {})  # of a policy that is served without a sampler
        self.metadata, self.spec, self.is_described = metadata, spec, True

    def _other_server(self, reason: object) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"What listens at {self.address} is no policy server ({_shown(str(reason))}); "
            "check host and port."
        )

    def _drop(self) -> None:
        """Forget the connection, without waiting for a server that may hang."""
        connection, self._connection = self._connection, None
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None
        if connection is not None:
            with contextlib.suppress(WebSocketException, OSError, EOFError):
                connection.close()


def _as_arrays(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _as_arrays(each) if isinstance(each, Mapping) else _as_array(each) for key, each in tree.items()
    }


def _as_array(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO":
        return value.tolist()  # strings, which the server reads
    return value


def _spec_of(metadata: Any) -> PolicySpec:
    """What a server's metadata say of its policy.

    Raises:
        ConfigError: they say it of none, or of observations that are none.
    """
    if not _describes_policy(metadata):
        raise ConfigError("shapes and horizons are missing")
    shapes = {key: tuple(shape) for key, shape in metadata["observation_shapes"].items()}
    features = features_of(shapes)
    for key, kind in metadata.get("observations", {}).items():
        features[key] = feature = Feature.from_settings(kind, f"observations.{key}")
        if feature.shape != shapes.get(key):
            raise ConfigError(f"observations.{key} is of another shape than observation_shapes says")
        feature.check_declaration(key)
    sizes = {key: metadata[key] for key in _SIZES[:-1]}
    sizes["noise_dim"] = metadata.get("noise_dim", metadata["action_dim"])
    actions = build(ActionConfig, {"rotations": metadata.get("rotations", {})}, "actions")
    actions.check(metadata["action_dim"], features)
    rate = metadata.get("control_hz")
    is_rate = isinstance(rate, (int, float)) and 0 < rate < float("inf")
    task = {"control_hz": float(rate)} if is_rate else {}
    name = str(metadata.get("policy", "remote"))
    return PolicySpec(features, **sizes, name=name, rotations=actions.rotations, task=task)


def _describes_policy(metadata: Any) -> bool:
    if not isinstance(metadata, dict) or not {"observation_shapes", *_SIZES} <= metadata.keys():
        return False
    shapes = metadata["observation_shapes"]
    if not all(isinstance(metadata.get(name, {}), dict) for name in ("sampling", "observations")):
        return False
    if not all(isinstance(kind, dict) for kind in metadata.get("observations", {}).values()):
        return False
    if not isinstance(shapes, dict) or not all(isinstance(key, str) for key in shapes):
        return False
    if not all(isinstance(shape, list) for shape in shapes.values()):
        return False
    sizes = (
        [metadata[key] for key in _SIZES]
        + [metadata.get("noise_dim", 1)]
        + [size for shape in shapes.values() for size in shape]
    )
    return all(type(size) is int and size >= 1 for size in sizes)


def _line(error: BaseException) -> str:
    return _shown(str(error)) or type(error).__name__


def _shown(text: str) -> str:
    """The first line of what a stranger may have written, short and printable."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return "".join(each if each.isprintable() else "?" for each in line)[:120].rstrip(".")
