"""A policy server, in the protocol of openpi, and its client."""

from flowpolicy.optional import optional

with optional("The policy server and its client need {name}", "serve", ImportError):
    import msgpack  # noqa: F401
    import websockets.asyncio  # noqa: F401
