"""A policy server, in the protocol of openpi, and its client."""
