"""Deployment: a policy in a real-time control loop, with safety, and telemetry."""
