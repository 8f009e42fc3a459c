"""A user's own function over all arrays of an import."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowpolicy.data.causes import first_line
from flowpolicy.data.importers.columns import numeric
from flowpolicy.data.keys import chosen_keys
from flowpolicy.data.rounding import collapses_in_float32
from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features.stored import KINDS


def transformed(demos: Demonstrations, dotted: str, keys: Any) -> Demonstrations:
    """Demonstrations whose arrays went through ``module:function``, a dict of arrays to a dict of arrays.

    Raises:
        ConfigError: a function that cannot be found.
        DataError: a function that fails on these data or does not return arrays, or a missing key.
    """
    module, _, name = dotted.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"demo_transform '{dotted}' cannot be found ({first_line(error)}); write it module:function."
        ) from error
    try:
        arrays = function(dict(demos.arrays))
    except KeyError as error:
        raise DataError(
            f"{demos.source} lacks {error}, which demo_transform '{dotted}' needs; is it for this data?"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise DataError(
            f"demo_transform '{dotted}' fails on {demos.source} ({first_line(error)})."
        ) from error
    if not isinstance(arrays, Mapping) or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise DataError(f"demo_transform '{dotted}' must return a dict of numpy arrays.")
    kept = list(arrays) if keys is None else chosen_keys(keys, arrays, demos.source)
    converted = {
        key: numeric(arrays[key], key, demos.source, is_wide=collapses_in_float32(arrays[key]))
        for key in kept
    }
    kinds = {  # of what the function left in the shape that was declared
        key: kind
        for key, kind in demos.attributes[KINDS].items()
        if key in converted and converted[key].shape == demos.arrays[key].shape
    }
    attributes = {**demos.attributes, KINDS: kinds}
    return Demonstrations(converted, demos.episode_ends, attributes, demos.source)
