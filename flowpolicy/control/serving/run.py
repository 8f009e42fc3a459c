"""A policy server from a checkpoint to a summary: build the sampler, serve, write what happened."""

from __future__ import annotations

import gc
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from flowpolicy.acceleration.sampler import Sampler
from flowpolicy.control.planners import SamplerSettings
from flowpolicy.control.planning.plan import DeploymentPlan
from flowpolicy.control.serving.config import TOKEN_VARIABLE, ServerConfig, listen_on
from flowpolicy.control.serving.server import PolicyServer
from flowpolicy.control.serving.service import PolicyService, describe
from flowpolicy.control.serving.statistics import ServerStatistics
from flowpolicy.errors import ConfigError
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.settings import require

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig):
    """Settings of `scripts/serve.py`: those of the server, and of the sampler that it serves.

    Attributes:
        checkpoint: folder of the policy.
        plan: a plan file of `scripts/plan.py`; it decides K, solver, backend, schedule, device and threads.
        num_steps: K; None takes the policy's own.
        solver: None takes the policy's own.
        backend: ``auto``, ``eager``, ``compile``, ``onnx`` or ``cuda_graph``.
        dtype: of the network.
        schedule: a cache schedule's file.
        device: of the policy.
        threads: CPU threads of one chunk.
        seed: of the noises that requests do not bring.
    """

    checkpoint: str
    plan: str | None = None
    num_steps: int | None = None
    solver: str | None = None
    backend: str = "auto"
    dtype: str = "float32"
    schedule: str | None = None
    device: str = "auto"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threads >= 1, "threads", self.threads, "at least 1")
        given = [name for name in ("num_steps", "solver", "schedule") if getattr(self, name) is not None]
        if self.plan and given:
            raise ConfigError(f"plan= decides {given[0]} too; leave out one of them.")

    def sampler(self) -> Sampler:
        """The sampler that is served, for one chunk at a time.

        Raises:
            FlowPolicyError: the checkpoint, the plan, a setting or the backend is not usable.
        """
        plan = DeploymentPlan.load(self.plan) if self.plan else None
        settings = plan.sampler_settings(self.checkpoint) if plan else SamplerSettings(
            self.checkpoint, self.num_steps, self.solver, self.backend, self.dtype, self.schedule,
            self.device, self.threads,
        )  # fmt: skip
        sampler = settings.build()
        assert isinstance(sampler, Sampler)
        if plan:
            plan.check(sampler.policy)
        return sampler


def serve_checkpoint(config: ServeConfig, run_dir: Path, command: str) -> ServerStatistics:
    """Serve until SIGINT or SIGTERM, then write ``summary.json``.

    Raises:
        FlowPolicyError: a setting, the address, the token, the checkpoint or the backend is not usable.
    """
    if config.token is not None:
        log.warning(
            "Other users of this machine can read token= in the list of programs; use token_file= or %s.",
            TOKEN_VARIABLE,
        )
        command = command.replace(config.token, "***")
    config.secret()
    listener = listen_on(config)  # a port that is taken is said at once; clients wait until it is ready
    with listener:
        log.info("Building the sampler of %s.", config.checkpoint)
        return serve_sampler(config.sampler(), config, run_dir, command, listener)


def serve_sampler(
    sampler: Sampler,
    config: ServeConfig,
    run_dir: Path,
    command: str,
    listener: socket.socket | None = None,
) -> ServerStatistics:
    """As :func:`serve_checkpoint`, with a sampler that is built already."""
    started = time.time()
    service = PolicyService(
        sampler, max_batch=config.max_batch, seed=config.seed, rows_per_turn=sampler.plan.batch_size,
        description=describe(sampler),
    )  # fmt: skip
    server = PolicyServer(service, config, listener)
    gc.freeze()  # what was built stays: the collector need not look through it while a robot waits
    server.run()
    statistics = server.statistics
    write_summary(
        run_dir, task=str(service.metadata["task"]), policy=sampler.name, seed=config.seed,
        steps=statistics.answered, wall_seconds=time.time() - started, metrics=statistics.content(),
        checkpoint=config.checkpoint, command=command, address=list(server.address),
        served=service.metadata,
    )  # fmt: skip
    return statistics
