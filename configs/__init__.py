"""Composed settings of the scripts, as package data: `env/`, `policy/`, `model/`, `data/`."""
