"""Robots for the control loop: simulated environments, recorded traces, lerobot hardware."""
