"""A policy server, in the protocol of openpi, and its client."""

try:
    import msgpack  # noqa: F401
    import websockets.asyncio  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"The policy server and its client need '{error.name}'; "
        "install it with: pip install 'flowpolicy[serve]'.",
        name=error.name,
    ) from error
