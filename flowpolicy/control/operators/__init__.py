"""Operators that a control loop can listen to, one file each."""
