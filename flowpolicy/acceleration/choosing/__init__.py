"""Which sampler keeps a deadline on this machine: candidates, measurement, choice."""
