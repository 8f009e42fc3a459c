"""A searched way of sampling: K, solver and grid that were found for one policy, as a JSON file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import read_versioned
from flowpolicy.files.storage import write_json
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.settings import Settings, build, require

FORMAT_VERSION = 1
_REMEDY = "make one with flowpolicy search-solver"


@dataclass(frozen=True)
class SearchedSampling(Settings, prefix="searched"):
    """K, solver and grid, and the policy that they were found for.

    Attributes:
        fingerprint: of that policy; see :func:`~flowpolicy.policy.fingerprint.fingerprint`.
        sampling: K, solver and grid, and nothing else.
        calibration: what they were found on, and what was measured.
    """

    fingerprint: str
    sampling: SamplerSpec
    calibration: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        named = self.sampling.content().keys()
        complete = named == {"num_steps", "solver", "grid"} and self.sampling.solver_file is None
        require(complete, "searched.sampling", self.sampling.content(), "num_steps, solver and grid")

    def save(self, path: Path | str) -> Path:
        """Write it as JSON, all or nothing."""
        content = {**dataclasses.asdict(self), "sampling": self.sampling.content()}
        write_json(path, {"format_version": FORMAT_VERSION, **content})
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> SearchedSampling:
        """Read one.

        Raises:
            CheckpointError: no such file, or nothing of the kind in it.
        """
        content = read_versioned(path, "searched solver", FORMAT_VERSION, _REMEDY)
        try:
            return build(cls, content, "searched")
        except ConfigError as error:
            raise CheckpointError(f"{path} is not a searched solver: {error}") from error

    def check(self, fingerprint: str) -> None:
        """Raise a ConfigError where it was found for another policy."""
        if self.fingerprint != fingerprint:
            raise ConfigError(f"The solver was searched for another checkpoint; {_REMEDY}.")

    def filling(self, spec: SamplerSpec) -> SamplerSpec:
        """``spec``, whose solver names this file, with what stands here in its place.

        Raises:
            ConfigError: it names another K or grid.
        """
        found = self.sampling
        for name in ("num_steps", "grid"):
            given = getattr(spec, name)
            allowed = f"{getattr(found, name)}, as {spec.solver_file} has it, or left out"
            require(given is None or given == getattr(found, name), name, given, allowed)
        return dataclasses.replace(spec, num_steps=found.num_steps, solver=found.solver, grid=found.grid)
