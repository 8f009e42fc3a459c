"""Deployment: a policy in a real-time control loop, with safety, telemetry, a server and a planner."""
