"""The kinds of a store's arrays: as its attribute ``kinds`` declares them, key by key.

A kind is given by its name, or by ``{"kind": name, ...}`` with settings of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features.feature import Feature, declared
from flowpolicy.features.undeclared import undeclared

KINDS = "kinds"
"""The attribute."""


def stored_feature(
    key: str, dtype: Any, shape: tuple[int, ...], attributes: Mapping[str, Any], where: object
) -> Feature:
    """What an array of a store holds.

    Args:
        key: of the array.
        dtype: of its elements.
        shape: of one row.
        attributes: of the store.
        where: the store, for messages.

    Raises:
        DataError: a declaration that is none, or of an unknown kind.
    """
    kinds = attributes.get(KINDS) or {}
    if not isinstance(kinds, Mapping) or not isinstance(kinds.get(key, ""), (str, Mapping)):
        raise DataError(f"{where}: attribute '{KINDS}' must give kinds by key; repair or remove it.")
    if key not in kinds:
        return undeclared(key, shape, np.dtype(dtype))
    try:
        return declared(kinds[key], shape, f"{KINDS}.{key}")
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
