"""What every run has: a folder, loggers, progress, seeds, a device, and other processes."""
