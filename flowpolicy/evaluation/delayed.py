"""Episodes in which the simulation continues during inference, in virtual time.

The delay is given in environment steps and no clock is read: what a policy loses by its latency is found
without the machine that has this latency.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError
from flowpolicy.evaluation.delay_rule import Delay, DelayRule
from flowpolicy.evaluation.episodes import EpisodeRecord, columns
from flowpolicy.evaluation.result import Episodes
from flowpolicy.evaluation.rollout import EVALUATION_SEED, check_spaces
from flowpolicy.evaluation.seams import Smoothness, smoothness
from flowpolicy.evaluation.task import Task
from flowpolicy.execution.fusion import Action, Chunk, Prefix
from flowpolicy.execution.history import HistoryBuffer
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.runs.progress import progress_bar
from flowpolicy.settings import require


@dataclass(frozen=True)
class DelayedResult(Episodes):
    """Episodes of one policy at one delay with one strategy; the seeds are also those of drawn delays.

    Attributes:
        smoothness: of the executed actions, at seams and inside chunks.
        chunks: chunks sampled.
        safe_ticks: environment steps in which the safe action was executed.
        nfe: network evaluations per chunk.
        simulation_seconds: wall time inside the environments.
        inference_seconds: wall time inside the policy.
    """

    smoothness: Smoothness
    chunks: int
    safe_ticks: int
    nfe: int
    simulation_seconds: float
    inference_seconds: float

    def metrics(self) -> dict[str, Any]:
        """Means with 95% intervals, None where the task has none, and the smoothness."""
        return {
            **self.means(),
            "chunks": self.chunks,
            "safe_ticks": self.safe_ticks,
            "nfe": self.nfe,
            **asdict(self.smoothness),
        }


def run_delayed(
    policy: ChunkPolicy,
    task: Task,
    *,
    strategy: str,
    delay: Delay,
    safe_action: str | Sequence[float] = "hold",
    execute_horizon: int | None = None,
    episodes: int,
    seed: int = EVALUATION_SEED,
    num_envs: int = 50,
    num_steps: int | None = None,
    solver: str | None = None,
    show_progress: bool = False,
) -> DelayedResult:
    """Run ``episodes`` whole episodes with a policy whose chunks arrive late.

    The rule is that of :class:`flowpolicy.control.loop.ControlLoop`. A chunk arrives ``delay`` steps of the
    environment after its observation and is entered at the number of its actions that were executed
    meanwhile, safe actions not counted: an episode's first chunk begins at its beginning. The next one is
    asked for when T_e actions were executed since the last request, or T_e steps have passed while there was
    none to execute, and the one under way has arrived. Meanwhile the previous chunk goes on, and where it has
    ended the safe action is executed. ``synchronous`` is the robot that stands still during inference: it
    executes the safe action until the chunk arrives, then T_e actions from the chunk's beginning.

    Episode i has the environment seed, and the noises x_0 in their order, of
    :func:`flowpolicy.evaluation.rollout.evaluate`; without delay, ``switch`` is what that does. All slots
    that are due at a tick share one batch. Each episode has a fusion of its own, which knows no delay of an
    earlier one.

    Args:
        policy: anything with the interface of :class:`~flowpolicy.execution.receding_horizon.ChunkPolicy`;
            ``rtc`` needs one that takes a prefix, such as a sampler guided by
            :class:`~flowpolicy.flow.prefix_guidance.PrefixGuidance`.
        task: the environment and T_e.
        strategy: ``synchronous``, ``switch``, ``ensemble`` or ``rtc``.
        delay: in environment steps: one number, several of which one is drawn for each request, or a
            function that draws one.
        safe_action: ``hold`` repeats the last action, ``zero``, or numbers ``(A,)``. Before the first chunk
            there is nothing to repeat: ``hold`` then leaves the world as it was, a robot at rest.
        execute_horizon: T_e; the task's where None.
        episodes: how many.
        seed: environment seed of the first episode.
        num_envs: environments side by side.
        num_steps: K; None takes the policy's own.
        solver: ODE solver; None takes the policy's own.
        show_progress: draw a bar where stderr is a terminal.

    Raises:
        ConfigError: a number out of range, a chunk too short for a fixed delay, or ``rtc`` with a policy that
            takes no prefix. Drawn delays are not checked: a chunk that comes too late is met by safe actions.
        TaskError: the environment cannot be made or does not fit the policy.
        FlowPolicyError: the policy answers with NaN or infinity.
    """
    require(episodes >= 1, "episodes", episodes, "at least 1")
    require(num_envs >= 1, "num_envs", num_envs, "at least 1")
    every = task.execute_horizon if execute_horizon is None else execute_horizon
    rule = DelayRule.of(policy, strategy, delay, every)
    slots: list[_Slot] = []
    try:
        for number in range(min(num_envs, episodes)):
            slots.append(_Slot(task.make(), rule, safe_action))
            if number == 0:
                check_spaces(slots[0].env, policy, f"Task '{task.name}'")
                slots[0].check_safe_action()
        run = _Run(policy, rule, slots, {"num_steps": num_steps, "solver": solver})
        with progress_bar(episodes if show_progress else None, f"{task.name}, {strategy}") as bar:
            run.episodes(episodes, seed, bar.update if show_progress else lambda count: None)
        width = slots[0].action_width()
    finally:
        for slot in slots:
            slot.env.close()
    done = [run.finished[episode] for episode in range(episodes)]
    executed = [(np.asarray(e.actions), np.asarray(e.sources)) for e in done]
    return DelayedResult(
        seeds=np.arange(seed, seed + episodes),
        **columns([episode.record for episode in done]),  # type: ignore[arg-type]
        smoothness=smoothness(executed, width, 1.0 / task.control_hz),
        chunks=run.chunks,
        safe_ticks=sum(int((sources < 0).sum()) for _, sources in executed),
        nfe=policy.nfe(num_steps, solver),
        simulation_seconds=run.simulation_seconds,
        inference_seconds=run.inference_seconds,
    )


class _Episode:
    """One episode: what was executed, and what came of it."""

    def __init__(self, number: int, seed: int, rule: DelayRule) -> None:
        self.number, self.rule, self.fusion = number, rule, rule.fusion()
        self.noises = torch.Generator().manual_seed(seed)
        self.delays = np.random.default_rng(seed)
        self.tick = self.step = 0  # of the environment, and actions of chunks that were executed
        self.holds = True  # the last tick executed none
        self.asked_tick = self.asked_step = -rule.execute_horizon  # of the last request
        self.under_way: Action | None = None
        self.arrives_at = 0
        self.arrived = 0
        self.actions: list[NDArray[Any]] = []
        self.sources: list[int] = []
        self.record = EpisodeRecord()

    def receive(self) -> None:
        """Take the chunk that is under way, where it arrives at this tick."""
        if self.under_way is not None and self.arrives_at <= self.tick:
            waited = self.tick - self.asked_tick - (self.step - self.asked_step)
            self.fusion.add(Chunk(self.under_way, self.asked_step, self.step, waited))
            self.under_way = None
            self.arrived += 1

    @property
    def is_due(self) -> bool:
        renews = self.holds and self.rule.strategy != "synchronous"
        used = self.tick - self.asked_tick if renews else self.step - self.asked_step
        return self.under_way is None and used >= self.rule.execute_horizon

    def ask(self, actions: Action) -> None:
        """A request is made at this tick; ``actions`` ``(T, A)`` arrive after a delay that is drawn now."""
        delay = self.rule.draw(self.delays)
        require(delay >= 0, "delay", delay, "0 or more")
        self.under_way = self.rule.executable(actions)
        self.asked_tick, self.asked_step, self.arrives_at = self.tick, self.step, self.tick + delay


class _Slot:
    """One environment and the episode that runs in it, if any."""

    def __init__(self, env: Any, rule: DelayRule, safe_action: str | Sequence[float]) -> None:
        self.env, self.rule, self.safe_action = env, rule, safe_action
        self.episode: _Episode | None = None
        spec = rule.policy.spec
        self.history = HistoryBuffer.of_features(spec.features, 1, spec.obs_horizon)

    def check_safe_action(self) -> None:
        shape, given = self.env.action_space.shape, self.safe_action
        ok = given in ("hold", "zero") if isinstance(given, str) else np.shape(given) == shape
        require(ok, "safe_action", given, f"hold, zero or {shape[0]} numbers")

    def action_width(self) -> NDArray[np.float64]:
        space = self.env.action_space
        width = np.asarray(space.high, np.float64) - np.asarray(space.low, np.float64)
        return np.where(np.isfinite(width) & (width > 0), width, 1.0)

    def start(self, number: int, seed: int) -> None:
        self.episode = _Episode(number, seed, self.rule)
        observation, _ = self.env.reset(seed=seed)
        self.history.restart()
        self._remember(observation)

    def step(self, episode: _Episode) -> bool:
        """Execute the tick's action; True where the episode has ended."""
        fused = episode.fusion.action(episode.step)
        source = -1 if fused is None else episode.arrived - 1
        episode.tick += 1
        episode.holds = fused is None
        episode.step += fused is not None
        action = self._safe(episode) if fused is None else fused
        if action is None:
            return False
        space = self.env.action_space
        bounded = np.clip(action, space.low, space.high).astype(space.dtype)
        observation, reward, terminated, truncated, info = self.env.step(bounded)
        episode.actions.append(bounded)
        episode.sources.append(source)
        episode.record.add(float(reward), info)
        self._remember(observation)
        return bool(terminated or truncated)

    def _safe(self, episode: _Episode) -> NDArray[Any] | None:
        """The safe action; None where there is nothing to hold yet."""
        if self.safe_action == "hold":
            return episode.actions[-1] if episode.actions else None
        shape = self.env.action_space.shape
        return np.zeros(shape) if self.safe_action == "zero" else np.asarray(self.safe_action, np.float64)

    def _remember(self, observation: Mapping[str, NDArray[Any]]) -> None:
        self.history.add({key: observation[key][None] for key in self.history.arrays})


class _Run:
    """The loop over ticks and episodes."""

    def __init__(
        self, policy: ChunkPolicy, rule: DelayRule, slots: list[_Slot], options: Mapping[str, Any]
    ) -> None:
        self.policy, self.rule, self.slots, self.options = policy, rule, slots, options
        self.finished: dict[int, _Episode] = {}
        self.chunks = 0
        self.simulation_seconds = self.inference_seconds = 0.0

    def episodes(self, count: int, seed: int, on_episode: Callable[[int], None]) -> None:
        """Run them; a slot that finishes takes the next one when the others ask for their next chunk."""
        waiting = deque(range(count))
        while len(self.finished) < count:
            running = [slot.episode for slot in self.slots if slot.episode is not None]
            for episode in running:
                episode.receive()
            if not running or any(episode.is_due for episode in running):
                for slot in self.slots:
                    if slot.episode is None and waiting:
                        number = waiting.popleft()
                        slot.start(number, seed + number)
            self._tick(on_episode)

    def _tick(self, on_episode: Callable[[int], None]) -> None:
        running = [(slot, slot.episode) for slot in self.slots if slot.episode is not None]
        asking = [(slot, episode) for slot, episode in running if episode.is_due]
        if asking:
            self._sample(asking)
        started = time.perf_counter()
        for slot, episode in running:
            episode.receive()  # a chunk without delay
            if slot.step(episode):
                self.finished[episode.number] = episode
                slot.episode = None
                on_episode(1)
        self.simulation_seconds += time.perf_counter() - started

    def _sample(self, asking: Sequence[tuple[_Slot, _Episode]]) -> None:
        """Plan a chunk for each, in one batch."""
        shape = self.policy.spec.chunk_shape
        noise_shape = self.policy.spec.noise_shape
        noise = torch.stack([torch.randn(noise_shape, generator=episode.noises) for _, episode in asking])
        batch = {
            key: np.concatenate([slot.history.arrays[key] for slot, _ in asking])
            for key in self.policy.spec.observation_shapes
        }
        prefixes = [episode.fusion.prefix(episode.step) for _, episode in asking]
        options = {**self.options, "noise": noise.to(self.policy.device)}
        if any(prefix is not None for prefix in prefixes):
            options["prefix"] = _stacked(prefixes, shape)
        started = time.perf_counter()
        with torch.no_grad():
            sampled = self.policy.act(batch, **options).to("cpu", torch.float32).numpy()
        self.inference_seconds += time.perf_counter() - started
        self.chunks += len(asking)
        if not np.isfinite(sampled).all():
            raise FlowPolicyError(
                "The policy answered with NaN or infinity; evaluate it without delay to find out why."
            )
        for (_, episode), actions in zip(asking, sampled, strict=True):
            episode.ask(actions)


def _stacked(prefixes: Sequence[Prefix | None], shape: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Actions ``(n, T, A)`` and weights ``(n, T)``; 0 where there is no prefix."""
    nothing = Prefix(np.zeros(shape, np.float32), np.zeros(shape[0], np.float32))
    given = [prefix or nothing for prefix in prefixes]
    return np.stack([prefix.actions for prefix in given]), np.stack([prefix.weights for prefix in given])
