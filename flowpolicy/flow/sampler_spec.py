"""The one description of how chunks are sampled: in checkpoints, plans, settings and server metadata."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Annotated, Any, Self

from flowpolicy.flow.grids import Grid, build_grid, described
from flowpolicy.flow.solvers import Solver, build_solver
from flowpolicy.ranges import PositiveInt, at_most, one_of
from flowpolicy.settings import Settings

MOST_STEPS = 1024
"""Integration steps K beyond which no chunk is sampled."""
DTYPES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class SamplerSpec(Settings):
    """How chunks are sampled.

    Attributes:
        num_steps: integration steps K; None takes the policy's own.
        solver: name of the ODE solver, or the ``.json`` file of a searched one, which brings K and grid; None
            takes the policy's own.
        grid: ``name`` and settings of the grid of flow times; None takes the policy's own.
        schedule: file of a cache schedule; None computes every block at every evaluation.
        backend: ``auto`` (ONNX Runtime on a CPU where it is installed, a CUDA graph on a GPU, else eager),
            ``eager``, ``compile``, ``cuda_graph`` or ``onnx``.
        dtype: of the network: ``float32``, ``bfloat16`` (not ``onnx``) or ``int8`` (weights, ``onnx`` only).
        guidance: ``name`` and settings of what bends the velocity field; None leaves it as it is.
    """

    num_steps: Annotated[PositiveInt, at_most(MOST_STEPS)] | None = None
    solver: str | None = None
    grid: dict[str, Any] | None = None
    schedule: str | None = None
    backend: str = "auto"
    dtype: Annotated[str, one_of(DTYPES)] = "float32"
    guidance: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver is not None and self.solver_file is None:
            build_solver(self.solver)
        if self.grid is not None:  # spelt out: what a default is may change
            object.__setattr__(self, "grid", described(build_grid(self.grid)))

    @property
    def solver_file(self) -> str | None:
        """The file that ``solver`` names, if it names one."""
        return self.solver if self.solver is not None and self.solver.endswith(".json") else None

    @property
    def steps(self) -> int:
        """K, of a description that names it."""
        assert self.num_steps is not None
        return self.num_steps

    @cached_property
    def solver_object(self) -> Solver:
        """The solver, of a description that names it."""
        assert self.solver is not None
        return build_solver(self.solver)

    @cached_property
    def grid_object(self) -> Grid:
        """The grid."""
        return build_grid(self.grid)

    def nfe(self) -> int:
        """Network evaluations of a chunk's integration."""
        return self.solver_object.nfe(self.steps)

    def filled(self, own: SamplerSpec) -> Self:
        """This description, with K, solver and grid of ``own`` where it names none."""
        return replace(
            self,
            num_steps=self.num_steps or own.num_steps,
            solver=self.solver or own.solver,
            grid=self.grid or own.grid,
        )

    def integrates_like(self, other: SamplerSpec) -> bool:
        """Whether K, solver and grid are the same: what trained weights are valid for."""
        mine, theirs = ((spec.num_steps, spec.solver_object, spec.grid_object) for spec in (self, other))
        return mine == theirs

    def __str__(self) -> str:
        grid = f", grid={self.grid}" if self.grid else ""
        return f"num_steps={self.num_steps}, solver={self.solver}{grid}"

    def content(self) -> dict[str, Any]:
        """What of it is not the default, for files."""
        default = SamplerSpec()
        values = {item.name: getattr(self, item.name) for item in fields(SamplerSpec)}
        return {name: value for name, value in values.items() if value != getattr(default, name)}
