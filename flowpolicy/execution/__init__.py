"""From chunks to one action a step: receding horizon, fusion of chunks that overlap."""
