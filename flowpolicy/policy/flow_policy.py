"""FlowPolicy: observations in physical units to an action chunk in physical units."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flowpolicy.data.normalization import Normalizer
from flowpolicy.errors import DAMAGED_POLICY, CheckpointError, ConfigError, FlowPolicyError
from flowpolicy.features.keyed import KeyedModules
from flowpolicy.files.hub import upload
from flowpolicy.files.reading import shapes_of, stored_tensors
from flowpolicy.files.storage import atomic_folder, save_tensors
from flowpolicy.flow import Objective, build_objective
from flowpolicy.flow.guidance import build_guidance
from flowpolicy.flow.network import Network, encode_images, field, velocities
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.network import build_network
from flowpolicy.policy.action_space import ActionSpace
from flowpolicy.policy.config import FORMAT_VERSION, PolicyConfig, checkpoint_folder, read_config
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.policy.observations import Observations, checked_observations
from flowpolicy.policy.searched import SearchedSampling
from flowpolicy.spec import PolicySpec

if TYPE_CHECKING:
    from flowpolicy.policy.steering import Steering


class FlowPolicy(nn.Module):
    """An action policy: a velocity network, its objective's sampler, the normalisers, and perhaps a steering.

    >>> policy = FlowPolicy.load("runs/hopper/checkpoint")  # doctest: +SKIP
    >>> chunk = policy.act({"observation": torch.zeros(1, 1, 11)})  # (1, T, A)  # doctest: +SKIP
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.objective: Objective = build_objective(config.objective)
        self.config = config
        self.action_space = ActionSpace(config.actions, config.action_dim)
        inner = self.action_space.inner_dim  # of actions as the network learns them
        spec = dataclasses.replace(self.spec, action_dim=inner)
        self.network = build_network(config.model, spec, self.objective.levels)
        self.steering: Steering | None = None
        if config.steering is not None:
            from flowpolicy.policy.steering import steering_config

            kind, settings = steering_config(config.steering)
            self.objective.require_flow()
            self.steering = kind(settings, self.network, spec, config.action_clip)
        self.observation_normalizers = KeyedModules(
            {
                key: Normalizer(feature.shape, config.observation_normalization, entries=entries)
                for key, feature in self.spec.features.items()
                if (entries := feature.normalized()).any()
            }
        )
        self.action_normalizer = Normalizer(
            (inner,), config.action_normalization, clip=max(1.0, config.action_clip)
        )

    @property
    def config(self) -> PolicyConfig:
        """All but the weights. Another one of the same network may be assigned; the rest follows it."""
        return self._config

    @config.setter
    def config(self, config: PolicyConfig) -> None:
        self._config = config
        self.sampling = config.sampling()
        self.spec = PolicySpec(
            config.observations,
            config.obs_horizon,
            config.action_horizon,
            config.execute_horizon,
            config.action_dim,
            self.objective.name,
            config.task,
            config.metadata,
            config.actions.inner_dim(config.action_dim) * config.draws(),
            config.actions.rotations,
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.action_space.moves.device  # a buffer, found sooner than the first of the parameters

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations of one chunk."""
        asked = SamplerSpec(num_steps=num_steps, solver=solver)
        return self.config.draws() * self.objective.nfe(self._filled(asked))

    def checked(self, spec: SamplerSpec, *, allow_any_steps: bool = False) -> SamplerSpec:
        """A description of sampling, filled with the policy's own K, solver and grid where it names none, and
        with those of the file that its solver names.

        Raises:
            CheckpointError: the file is not there, or holds no searched solver.
            ConfigError: the policy cannot be sampled so, was tuned for another K, solver or grid, or the
                solver was searched for another policy.
        """
        spec = self._filled(spec)
        tuned = self.config.tuned
        if tuned is not None and not allow_any_steps and not spec.integrates_like(self.sampling):
            raise ConfigError(
                f"This checkpoint is tuned for {self.sampling}, not for {spec}; pass allow_any_steps=True to "
                "use it untrained."
            )
        self.objective.check(spec)
        return spec

    def _filled(self, spec: SamplerSpec) -> SamplerSpec:
        guidance = build_guidance(spec.guidance)
        if guidance is not None and spec.solver is None:
            spec = dataclasses.replace(spec, solver=guidance.solver)
        if spec.solver_file is None:
            return spec.filled(self.sampling)
        searched = SearchedSampling.load(spec.solver_file)
        searched.check(fingerprint(self))
        return searched.filling(spec)

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        *,
        num_steps: int | None = None,
        solver: str | None = None,
        sampler: SamplerSpec | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        allow_any_steps: bool = False,
    ) -> Tensor:
        """Sample action chunks.

        Args:
            observations: key -> ``(B, T_o, *shape)`` in physical units, oldest first; a plain array stands
                for the key ``observation``.
            num_steps: K; the policy's default where None.
            solver: ``euler``, ``midpoint``, ``heun``, ``taylor``, ``ab2``, ``ab3``, or the file of a searched
                one; the policy's own where None.
            sampler: K, solver and grid in place of these two; backends, caching and guidance are
                :func:`~flowpolicy.acceleration.sampler.build_sampler`'s.
            noise: x_0 ``(B, *spec.noise_shape)``; drawn from ``generator`` where None.
            generator: source of x_0.
            allow_any_steps: accept a K that a fine-tuned checkpoint was not tuned for.

        Returns:
            ``(B, T, A)`` float32 in physical units, on the policy's device.

        Raises:
            ConfigError: a K or solver the policy does not have.
            FlowPolicyError: observations of a wrong shape, with NaN, or with a missing key.
        """
        spec = self.sampling
        if sampler is not None or num_steps is not None or solver is not None:
            asked = sampler or SamplerSpec(num_steps=num_steps, solver=solver)
            if asked.schedule or asked.guidance or asked.dtype != "float32":
                raise ConfigError(
                    "policy.act() takes K, solver and grid; build a sampler for a schedule, a guidance or a "
                    "dtype: flowpolicy.acceleration.sampler.build_sampler(policy, sampling)."
                )
            spec = self.checked(asked, allow_any_steps=allow_any_steps)
        checked = self.check_observations(observations)
        normalized = self.normalize(checked)
        noise = self.noise(len(next(iter(normalized.values()))), noise, generator)
        sampled = self.sample(normalized, noise, spec)
        chunk = self.decode(self.action_normalizer.denormalize(sampled), checked)
        if not torch.isfinite(chunk).all():
            raise FlowPolicyError(DAMAGED_POLICY)
        return chunk

    def sample(self, observation: Mapping[str, Tensor], noise: Tensor, spec: SamplerSpec) -> Tensor:
        """Normalised chunks ``(B, T, A')`` of normalised observations and x_0 ``(B, *spec.noise_shape)``."""
        if self.steering is None:
            bound = self.config.action_clip
            return sample_chunk(self.network, self.objective, observation, noise, spec, bound)
        observation = encode_images(self.network, observation)
        draws = noise.view(*noise.shape[:2], self.steering.draws, -1).transpose(1, 2)
        return self.steering.chunk(observation, draws, lambda x: self.proposals(observation, x, spec))

    def proposals(self, observation: Mapping[str, Tensor], noise: Tensor, spec: SamplerSpec) -> Tensor:
        """Normalised chunks of the flow alone from M x_0 for each observation, both ``(B, M, T, A')``."""
        network, objective, draws = self.network, self.objective, noise.shape[1]
        context = network.encode(observation)

        def velocity(x: Tensor, t: float, h: float) -> Tensor:
            d = objective.step_size(h)
            return velocities(network, x, x.new_full((draws,), t), x.new_full((draws,), d), context)

        chunks = objective.sample(velocity, noise.transpose(0, 1), spec).transpose(0, 1)
        return chunks.clamp(-self.config.action_clip, self.config.action_clip)

    def require_unsteered(self, doing: str) -> None:
        """Raise a ConfigError where there is a steering, which ``doing`` would leave out."""
        if self.steering is not None:
            raise ConfigError(
                f"{doing} takes a policy without steering, and this one has '{self.steering.name}'; take the "
                "checkpoint that it was made from, or make a plain one of it with `flowpolicy distill "
                "method=imitate`."
            )

    def noise(self, rows: int, given: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """x_0 ``(rows, *spec.noise_shape)``, float32 on the policy's device: the given one, or drawn from
        ``generator``.

        Raises:
            FlowPolicyError: the given one has another shape.
        """
        shape = (rows, *self.spec.noise_shape)
        if given is None:
            source = generator.device if generator is not None else self.device
            given = torch.randn(shape, generator=generator, device=source)
        elif tuple(given.shape) != shape:
            raise FlowPolicyError(f"The noise has shape {tuple(given.shape)}; it must be {shape}.")
        return given.to(self.device, torch.float32)

    def finish(self, chunk: Tensor) -> Tensor:
        """A sampled normalised chunk to physical units, held within ``action_clip``; :meth:`decode` makes
        commands of it."""
        return self.action_normalizer.denormalize(
            chunk.clamp(-self.config.action_clip, self.config.action_clip)
        )

    def decode(self, actions: Tensor, observation: Mapping[str, Tensor]) -> Tensor:
        """Actions ``(B, T, A')`` as the network learns them, in physical units, to commands ``(B, T, A)``.

        ``observation`` is checked and in physical units, key -> ``(B, T_o, *shape)``.
        """
        if self.action_space.is_plain:
            return actions
        return self.action_space.decode(actions, self._base(observation))

    def encode(self, commands: Tensor, observation: Mapping[str, Tensor]) -> Tensor:
        """Commands ``(B, T, A)`` to normalised actions ``(B, T, A')``; the inverse of :meth:`decode`."""
        if self.action_space.is_plain:
            return self.action_normalizer.normalize(commands)
        inner = self.action_space.encode(commands, self._base(observation))
        return self.action_normalizer.normalize(inner)

    def _base(self, observation: Mapping[str, Tensor]) -> Tensor | None:
        keys = self.action_space.state_keys
        newest = {key: observation[key][:, -1].to(self.device) for key in keys}
        return self.action_space.base(newest)

    def normalize_observations(self, observations: Observations) -> dict[str, Tensor]:
        """Check and normalise observations, key -> ``(B, T_o, *shape)``."""
        return self.normalize(self.check_observations(observations))

    def normalize(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise checked observations, key -> ``(B, T_o, *shape)``; what has no statistics
        stays as it is."""
        normalized = {key: observations[key] for key in self.spec.features}
        for key, normalizer in self.observation_normalizers.items():
            normalized[key] = normalizer.normalize(observations[key])
        return normalized

    def check_observations(self, observations: Observations) -> dict[str, Tensor]:
        """:func:`~flowpolicy.policy.observations.checked_observations` on the policy's device."""
        return checked_observations(self.spec, observations, self.device)

    def fit_normalizers(self, observation: Mapping[str, Tensor], action: Tensor) -> None:
        """Set the statistics from demonstrations: key -> ``(steps, *shape)``, actions ``(steps, A')`` as the
        network learns them.

        No action is cut off: where one would lie beyond the clip, its dimension's map is widened.
        """
        for key, normalizer in self.observation_normalizers.items():
            entries = self.spec.features[key].normalized()
            fitted = Normalizer.fit(observation[key], self.config.observation_normalization, entries=entries)
            normalizer.load_state_dict(fitted.state_dict())
        clip = self.action_normalizer.clip
        fitted = Normalizer.fit(action, self.config.action_normalization, clip, keep_all=True)
        self.action_normalizer.load_state_dict(fitted.state_dict())

    def load_normalizers(self, other: FlowPolicy) -> None:
        """Take over the statistics of a policy with the same observations, actions and modes."""
        self.observation_normalizers.load_state_dict(other.observation_normalizers.state_dict())
        self.action_normalizer.load_state_dict(other.action_normalizer.state_dict())

    def lost_actions(self, action: Tensor) -> float:
        """Share of actions ``(steps, A')``, as the network learns them, that the policy cannot give back; see
        :meth:`Normalizer.lost`.
        """
        return self.action_normalizer.lost_share(action, self.config.action_clip)

    def lost_observations(self, observation: Mapping[str, Tensor]) -> dict[str, float]:
        """Share of the steps, key by key, of which the policy does not see every number as it is: they are
        beyond the clip of the normaliser.
        """
        return {
            key: normalizer.lost_share(observation[key])
            for key, normalizer in self.observation_normalizers.items()
        }

    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def save(self, path: Path | str, *, dtype: torch.dtype = torch.float32) -> Path:
        """Write ``config.json`` and ``model.safetensors`` to the folder ``path``, all or nothing.

        ``dtype`` is that of the network's weights on disk; normalisers stay float32.
        """
        content = {"format_version": FORMAT_VERSION, **self.config.content()}
        tensors = {
            name: tensor.to(dtype) if name.startswith("network.") else tensor
            for name, tensor in self.state_dict().items()
        }
        with atomic_folder(path) as folder:
            (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
            save_tensors(tensors, folder / "model.safetensors")
        return Path(path)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> FlowPolicy:
        """Read a checkpoint folder, or a Hub repository where ``path`` is no folder but ``user/name``.

        No pickle is involved: loading a stranger's policy runs no code.

        Raises:
            CheckpointError: missing, damaged, of a newer format, or not of this shape.
        """
        folder = checkpoint_folder(path)
        config = read_config(folder / "config.json")
        file = folder / "model.safetensors"
        if not file.exists():
            raise CheckpointError(f"{folder} has no model.safetensors; the checkpoint is incomplete.")
        stored = stored_tensors(file)
        stored.require_shapes(declared_shapes(config, folder / "config.json"), "config.json")
        policy = cls(config)
        policy.load_weights(stored.read(), file)
        return policy.to(device).eval()

    def load_weights(self, tensors: Mapping[str, Tensor], file: Path | str) -> None:
        """Take over finite tensors of the right shapes; ``file`` is where they come from.

        Raises:
            CheckpointError: a normaliser maps numbers to none.
        """
        self.load_state_dict(dict(tensors))
        self.check_normalizers(file)

    def check_normalizers(self, file: object) -> None:
        """Raise a CheckpointError where a normaliser that came from ``file`` maps numbers to none."""
        for name, module in self.named_modules():
            if isinstance(module, Normalizer):
                reach = module.clip * module.scale + module.center.abs()
                usable = torch.isfinite(reach) & (module.scale >= 0)
                if not usable.all():
                    raise CheckpointError(
                        f"{file}: '{name}' scales by numbers that are negative, or too large "
                        "for float32; the checkpoint is unusable."
                    )

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload the checkpoint to the Hugging Face Hub; returns its address. Needs ``huggingface_hub``."""
        with tempfile.TemporaryDirectory() as temporary:
            return upload(self.save(Path(temporary) / "checkpoint"), repo_id, private=private)


def sample_chunk(
    network: Network,
    objective: Objective,
    observation: Mapping[str, Tensor],
    noise: Tensor,
    spec: SamplerSpec,
    bound: float,
) -> Tensor:
    """The normalised chunk ``(B, T, A)`` of normalised observations from x_0 ``(B, T, A)``, held within
    +-``bound``."""
    velocity = field(network, network.encode(observation), objective.step_size)
    return objective.sample(velocity, noise, spec).clamp(-bound, bound)


def declared_shapes(config: PolicyConfig, source: Path | str) -> dict[str, tuple[int, ...]]:
    """Shapes of a policy's state, from its config alone and without the memory for it.

    Raises:
        CheckpointError: the config, which comes from ``source``, describes no policy.
    """
    try:
        return shapes_of(lambda: FlowPolicy(config))
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise CheckpointError(f"{source} does not describe a policy: {reason}.") from error
