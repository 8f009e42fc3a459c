"""A policy server from a checkpoint to a summary: build the sampler, serve, write the results."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from flowpolicy.acceleration.choosing.plan import DeployConfig
from flowpolicy.acceleration.sampler import Sampler
from flowpolicy.evaluation.summary import write_summary
from flowpolicy.policy import FlowPolicy
from flowpolicy.serving.config import TOKEN_VARIABLE, ServerConfig
from flowpolicy.serving.connections import ServerStatistics
from flowpolicy.serving.listener import Listener, listen_on
from flowpolicy.serving.server import PolicyServer
from flowpolicy.serving.service import PolicyService, describe

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ServerConfig, DeployConfig):
    """Settings of `scripts/serve.py`: those of the server, and of the sampler that it serves.

    Attributes:
        seed: of the noises that requests do not bring.
    """

    seed: int = 0

    def sampler(self) -> Sampler:
        """The sampler that is served, for one chunk at a time.

        Raises:
            FlowPolicyError: the checkpoint, the plan, a setting or the backend is not usable.
        """
        plan = self.read_plan(FlowPolicy.load(self.checkpoint)) if self.plan else None
        return (plan.deployed(self.checkpoint) if plan else self.deployed()).build()


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
    sampler: Sampler, config: ServeConfig, run_dir: Path, command: str, listener: Listener | None = None
) -> ServerStatistics:
    """As :func:`serve_checkpoint`, with a sampler that is built already."""
    started = time.time()
    service = PolicyService(
        sampler, max_batch=config.max_batch, seed=config.seed, rows_per_turn=sampler.batch_size,
        description=describe(sampler),
    )  # fmt: skip
    server = PolicyServer(service, config, listener)
    gc.freeze()  # what was built stays: the collector need not look through it while a robot waits
    server.run()
    statistics = server.statistics
    write_summary(
        run_dir, task=str(service.metadata["task"]), policy=sampler.spec.name, seed=config.seed,
        steps=statistics.answered, wall_seconds=time.time() - started, metrics=statistics.content(),
        checkpoint=config.checkpoint, command=command, address=list(server.address),
        served=service.metadata,
    )  # fmt: skip
    return statistics
