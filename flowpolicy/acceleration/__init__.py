"""Faster sampling of a trained policy: static samplers, block-wise adaptive caching, latency measurement."""
