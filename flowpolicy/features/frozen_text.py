"""What to do, in words that a language model read before."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, TokenSizes
from flowpolicy.features.keyed import KeyedModules
from flowpolicy.features.text import TextFeature
from flowpolicy.optional import optional
from flowpolicy.plugins import register
from flowpolicy.settings import require

_MOST_TOKENS = 512


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class FrozenText(TextFeature):
    """A text as the vector of a frozen encoder: the mean of its last features, of length 1, which is what
    most models of sentence-transformers give (Reimers and Gurevych 2019, "Sentence-BERT").

    The vector of a text is computed once in a process. Needs transformers.

    Attributes:
        model: folder of a model, or its name on the Hugging Face Hub.
    """

    model: str = ""

    name: ClassVar[str] = "frozen_text"
    dtype: ClassVar[type[np.generic]] = np.float32

    @classmethod
    def shape_from(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """As the model has it."""
        model = str(settings.get("model") or "")
        require(bool(model), f"the kind {cls.name}'s model", model, "a folder, or a name on the Hub")
        return vector_of(model, "").shape

    def read(self, text: str) -> NDArray[Any]:
        """Its vector."""
        return vector_of(self.model, text)

    @classmethod
    def encoder(cls, features: Mapping[str, Any], obs_horizon: int, sizes: TokenSizes) -> FrozenTextEncoder:
        """A token of the newest step for each key."""
        return FrozenTextEncoder(features, sizes.width)


class FrozenTextEncoder(KeyedModules[nn.Sequential]):
    """One token for each text, of the newest step, from its vector.

    Args:
        features: by key.
        width: channels of a token, d.
    """

    def __init__(self, features: Mapping[str, FrozenText], width: int) -> None:
        super().__init__(
            {
                key: nn.Sequential(
                    nn.LayerNorm(feature.shape[0]), nn.Linear(feature.shape[0], width), nn.LayerNorm(width)
                )
                for key, feature in features.items()
            }
        )

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, number of texts, d)``."""
        return torch.stack([embed(observation[key][:, -1]) for key, embed in self.items()], 1)


@functools.lru_cache(1024)
def vector_of(model: str, text: str) -> NDArray[np.float32]:
    """The vector ``(size,)`` of a text.

    Raises:
        ConfigError: the model is not there, or reads no text.
    """
    tokenizer, network = _loaded(model)
    longest = min(tokenizer.model_max_length, _MOST_TOKENS)
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)
    with torch.inference_mode():
        features = network(**tokens).last_hidden_state[0].float()
    there = tokens["attention_mask"][0, :, None].float()
    mean = (features * there).sum(0) / there.sum().clamp(min=1)
    vector: NDArray[np.float32] = (mean / mean.norm().clamp(min=1e-9)).numpy()
    vector.flags.writeable = False
    return vector


@functools.lru_cache(2)
def _loaded(model: str) -> tuple[Any, Any]:
    """Tokenizer and network; no code of the model's is run, and no pickle read."""
    with optional("A frozen_text observation needs {name}", "text"):
        from transformers import AutoModel, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        network = AutoModel.from_pretrained(model, trust_remote_code=False, use_safetensors=True)
    except Exception as error:  # whatever the Hub and a folder raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise ConfigError(
            f"The text encoder '{model}' cannot be loaded ({reason}); give the folder of a transformers "
            "model with safetensors, or a name on the Hugging Face Hub."
        ) from error
    network = getattr(network, "text_model", None) or network  # of CLIP and its like, which see too
    network = network.get_encoder() if getattr(network.config, "is_encoder_decoder", False) else network
    return tokenizer, network.eval().requires_grad_(False)
