"""A policy server, in the protocol of openpi, and its client."""

from flowpolicy.errors import ConfigError

try:
    import msgpack  # noqa: F401
    import websockets  # noqa: F401
except ImportError as error:
    raise ConfigError(
        f"The policy server and its client need '{error.name}'; "
        "install it with: pip install 'flowpolicy[serve]'."
    ) from error
