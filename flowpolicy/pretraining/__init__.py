"""The supervised trainer: settings, loop, state on disk, one or many processes."""
