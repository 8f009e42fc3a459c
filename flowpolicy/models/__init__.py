"""The velocity network: transformer, residual branches, observation encoders."""
