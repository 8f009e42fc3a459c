"""Rollouts, statistics with confidence intervals, video, plots and the run's summary."""
