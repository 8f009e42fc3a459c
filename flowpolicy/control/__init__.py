"""Deployment: a policy in a real-time control loop, with a safety gate and telemetry."""
