"""The answers of a policy server, independent of any network: a message in, a message out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import flowpolicy
from flowpolicy.acceleration.sampler import Sampler
from flowpolicy.errors import DAMAGED_POLICY, FlowPolicyError
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.features import Feature, Task, TextFeature
from flowpolicy.features.presence import completed
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.serving.messages import decode, encode
from flowpolicy.settings import require

log = logging.getLogger(__name__)

NOISE = "noise"
"""Key of a request's x_0."""

PROMPT = "prompt"
"""Key of a request's instruction, which openpi's clients send."""


@dataclass(frozen=True)
class ChunkRequest:
    """A checked request.

    Attributes:
        observations: key -> ``(B, T_o, *shape)``: float32, physical units; uint8 of an image.
        noise: x_0 ``(B, T, A)``.
        is_batch: whether it was sent with a leading batch dimension.
    """

    observations: dict[str, NDArray[Any]]
    noise: NDArray[np.float32]
    is_batch: bool


class PolicyService:
    """Answers requests with action chunks; one thread at a time.

    A request is a map with the policy's observation keys: ``(T_o, *shape)`` each, oldest step first, or
    ``shape`` alone where T_o = 1, in physical units; or ``(B, T_o, *shape)`` for several chunks at once. For
    T_o > 1 the client stacks the history, since the server keeps none. The optional entry ``noise`` is x_0,
    ``(T, A)`` with the same batch dimension; else the server draws it. What openpi's example clients send
    fits too: ``prompt`` is the text that the policy reads, or left out where it reads none; a map in the map
    names its entries by a path, such as ``images/cam_high``; a path whose beginning the policy does not know,
    such as ``observation/``, stands for its end; an image may have its channels first. A text is a string
    for all chunks, or a list of B. The answer holds ``actions``,
    ``(T, A)`` or ``(B, T, A)`` float32 in physical units, and milliseconds in ``server_timing`` and
    ``policy_timing``.

    Args:
        policy: a policy or a sampler of one.
        max_batch: most chunks of one request.
        seed: of the noises that requests do not bring.
        rows_per_turn: chunks computed before others have their turn; a sampler's batch size.
        description: further entries of the metadata.

    Attributes:
        metadata: sent to every client when it connects.
        max_message_bytes: most bytes of a request.
    """

    def __init__(
        self, policy: ChunkPolicy, *, max_batch: int = 64, seed: int = 0, rows_per_turn: int = 1,
        description: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        require(max_batch >= 1, "max_batch", max_batch, "at least 1")
        require(rows_per_turn >= 1, "rows_per_turn", rows_per_turn, "at least 1")
        if NOISE in policy.spec.observation_shapes:
            raise FlowPolicyError(f"The policy has an observation '{NOISE}', the protocol's name for x_0.")
        self.policy, self.max_batch, self.rows_per_turn = policy, max_batch, rows_per_turn
        self._has_told_of_prompt = False
        self._generator = torch.Generator().manual_seed(seed)
        self._noise_shape = policy.spec.noise_shape
        self._features = dict(policy.spec.features)
        self.metadata: dict[str, Any] = {
            "server": f"flowpolicy {flowpolicy.__version__}",
            "observation_shapes": {key: list(shape) for key, shape in policy.spec.observation_shapes.items()},
            "observations": {key: feature.content() for key, feature in self._features.items()},
            "obs_horizon": policy.spec.obs_horizon,
            "action_horizon": policy.spec.action_horizon,
            "execute_horizon": policy.spec.execute_horizon,
            "action_dim": policy.spec.action_dim,
            "noise_dim": self._noise_shape[1],
            "rotations": {kind: list(starts) for kind, starts in policy.spec.rotations.items()},
            "nfe": policy.nfe(),
            "max_batch": max_batch,
            **(description or {}),
        }
        seen = sum(math.prod(shape) for shape in policy.spec.observation_shapes.values())
        numbers = policy.spec.obs_horizon * seen + math.prod(self._noise_shape)
        self.max_message_bytes = 65536 + 8 * numbers * max_batch  # 8: float64, the widest that is sent

    def warm_up(self, calls: int = 3) -> None:
        """Sample a few chunks: backends allocate and choose kernels in the first ones."""
        message = encode(self.policy.spec.resting_observation())
        generator = self._generator.get_state()
        for _ in range(calls):
            list(self.answer(message))
        self._generator.set_state(generator)

    def answer(self, message: bytes | str, received: float | None = None) -> Iterator[bytes | None]:
        """Work on a message: None after each part of the work, at last the answer.

        Args:
            message: of a client.
            received: moment of ``time.perf_counter`` when it came, for the answer's timing.

        Raises:
            FlowPolicyError: the message is not a request of this policy, or the policy answers with NaN.
        """
        started = time.perf_counter()
        request = self.read(message)
        count, inference = len(request.noise), 0.0
        chunks = []
        for start in range(0, count, self.rows_per_turn):
            if start:
                yield None
            part = slice(start, start + self.rows_per_turn)
            observations = {key: rows[part] for key, rows in request.observations.items()}
            before = time.perf_counter()
            chunks.append(self._sample(observations, request.noise[part]))
            inference += time.perf_counter() - before
        actions = np.concatenate(chunks) if len(chunks) > 1 else chunks[0]
        if not np.isfinite(actions).all():
            raise FlowPolicyError(DAMAGED_POLICY)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - started)}
        if received is not None:
            timing["queue_ms"] = 1e3 * (started - received)
        actions = actions if request.is_batch else actions[0]
        policy_timing = {"infer_ms": 1e3 * inference}
        yield encode({"actions": actions, "server_timing": timing, "policy_timing": policy_timing})

    def read(self, message: bytes | str) -> ChunkRequest:
        """Check a message.

        Raises:
            MessageError: it cannot be decoded.
            FlowPolicyError: an unknown or missing key, a wrong shape, NaN or infinity.
        """
        if isinstance(message, str):
            raise FlowPolicyError("The request is text; send a binary message of msgpack.")
        content = decode(message)
        if not isinstance(content, dict):
            raise FlowPolicyError("The request is no map; send one from observation keys to arrays.")
        content = completed(self._features, self._named(content))
        observations: dict[str, NDArray[Any]] = {}
        texts: dict[str, NDArray[Any]] = {}  # (*shape), (B, *shape) or (B, T_o, *shape)
        sizes: set[int | None] = set()  # None: sent without a batch dimension
        for key, feature in self._features.items():
            if key not in content:
                raise FlowPolicyError(
                    f"The observation lacks '{key}'; the policy takes {', '.join(self._features)}."
                )
            name, value = f"Observation '{key}'", content[key]
            if isinstance(feature, TextFeature) and isinstance(value, (str, list)):
                texts[key] = _text(name, value, feature)
                continue
            observations[key], size = _checked(name, value, feature, self.policy.spec.obs_horizon)
            sizes.add(size)
        sizes |= {len(text) for text in texts.values() if text.ndim > 1}
        if len(sizes) > 1:
            raise FlowPolicyError("The observations have different batch sizes; send all with the same.")
        batch = sizes.pop() if sizes else None
        rows = 1 if batch is None else batch
        if not 1 <= rows <= self.max_batch:
            raise FlowPolicyError(
                f"The batch has {rows} observations; this server takes 1 to {self.max_batch}."
            )
        if NOISE in content:
            steps, numbers = self._noise_shape
            noise, size = _checked("The noise", content[NOISE], Feature((numbers,)), steps)
            if size != batch:
                raise FlowPolicyError("The noise and the observations have different batch sizes.")
        else:
            noise = torch.randn((rows, *self._noise_shape), generator=self._generator).numpy()
        for key, text in texts.items():  # one for all chunks, one for each, or one for each step of each
            shape = (rows, self.policy.spec.obs_horizon, *text.shape[-1:])
            told = text if text.ndim == 3 else text[..., None, :]
            if told.ndim == 3 and told.shape[1] not in (1, shape[1]):
                raise FlowPolicyError(
                    f"Observation '{key}' has {told.shape[1]} steps; send {shape[1]}, or one."
                )
            observations[key] = np.broadcast_to(told, shape).copy()
        return ChunkRequest(observations, noise, batch is not None)

    def _named(self, content: Mapping[Any, Any]) -> dict[str, Any]:
        """The entries of a request by the policy's names."""
        named: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for path, value in _entries(content):
            key = self._name(path)
            if key is None and path == PROMPT:
                key = next(
                    (key for key, each in self._features.items() if isinstance(each, TextFeature)), None
                )
                if key is None:
                    self._leave_out_prompt(value)
                    continue
            if key is None:
                raise FlowPolicyError(
                    f"The request has the unknown entry '{path[:60]}'; the policy takes "
                    f"{', '.join(self._features)}, and {NOISE}."
                )
            if key in named:
                raise FlowPolicyError(
                    f"The request's '{sources[key][:60]}' and '{path[:60]}' both mean '{key}'; send one."
                )
            named[key], sources[key] = value, path
        return named

    def _name(self, path: str) -> str | None:
        """The policy's own name of an entry: the path, or its longest end that the policy has."""
        if path == NOISE:
            return NOISE
        parts = path.split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        return next((end for end in ends if end in self._features), None)

    def _leave_out_prompt(self, prompt: Any) -> None:
        texts = prompt if isinstance(prompt, list) else [prompt]
        if not all(isinstance(text, str) for text in texts):
            raise FlowPolicyError(f"The request's '{PROMPT}' is no text; send a string, or leave it out.")
        if not self._has_told_of_prompt:
            self._has_told_of_prompt = True
            tasks = [key for key, feature in self._features.items() if isinstance(feature, Task)]
            told = f"; it reads which task is meant from the one-hot vector '{tasks[0]}'" if tasks else ""
            log.info("A client sends '%s', which this policy does not read%s.", PROMPT, told)

    def _sample(
        self, observations: Mapping[str, NDArray[Any]], noise: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        with torch.no_grad():
            chunk = self.policy.act(observations, noise=torch.from_numpy(noise))
        sampled: NDArray[np.float32] = chunk.to("cpu", torch.float32).numpy()
        return sampled


def describe(sampler: Sampler) -> dict[str, Any]:
    """A sampler's own entries of the metadata: how it samples, and whose weights it has."""
    return {
        "policy": sampler.spec.name,
        "fingerprint": fingerprint(sampler.policy),
        "sampling": sampler.sampling.content(),
        "task": sampler.spec.task.get("name"),
        "control_hz": sampler.spec.task.get("control_hz"),
    }


def _entries(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a map of maps, named by their paths."""
    for key, value in content.items():
        path = f"{prefix}{key.decode('utf-8', 'replace') if isinstance(key, bytes) else key}"
        if isinstance(value, dict):
            yield from _entries(value, f"{path}/")
        else:
            yield path, value


def _checked(name: str, value: Any, feature: Feature, steps: int) -> tuple[NDArray[Any], int | None]:
    """``(B, steps, *shape)`` from an array of that shape, without B, or, where there is one step, without it;
    and B, None where it was sent without."""
    if not isinstance(value, np.ndarray):
        raise FlowPolicyError(f"{name} is no array; send a numpy array of numbers.")
    shape = (steps, *feature.shape)
    fitted = _batched(value, shape)
    if fitted is None and (moved := feature.rearranged(value)) is not None:
        fitted = _batched(moved, shape)
    if fitted is None:
        sizes = ", ".join(map(str, shape))
        raise FlowPolicyError(f"{name} has shape {value.shape}; send ({sizes}), or (batch, {sizes}).")
    rows, batch = feature.array(fitted[0]), fitted[1]
    problem = feature.problem(rows)
    if problem:
        raise FlowPolicyError(f"{name} {problem}.")
    return rows, batch


def _text(name: str, value: Any, feature: TextFeature) -> NDArray[Any]:
    """The numbers of one text, of a list of them, or of a list of lists."""
    rows = [
        row if isinstance(row, list) else [row] for row in (value if isinstance(value, list) else [value])
    ]
    is_text = all(isinstance(text, str) for row in rows for text in row)
    if not is_text or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise FlowPolicyError(f"{name} is no text; send a string, or a list of strings.")
    try:
        return feature.array(value)
    except ValueError as error:
        raise FlowPolicyError(f"{name} {error}.") from error


def _batched(value: NDArray[Any], shape: tuple[int, ...]) -> tuple[NDArray[Any], int | None] | None:
    """``(B, *shape)`` and the B that it was sent with; None where the value has another shape."""
    if value.shape[1:] == shape:
        return value, len(value)
    if value.shape == shape:
        return value[None], None
    return (value[None, None], None) if shape[0] == 1 and value.shape == shape[1:] else None
