"""Thin entry points, installed as the sub-commands of ``flowpolicy``: compose a config, call the library."""
