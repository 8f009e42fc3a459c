"""Robots that the control loop can drive: simulated worlds, recorded traces, lerobot hardware."""
