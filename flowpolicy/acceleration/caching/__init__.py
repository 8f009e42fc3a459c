"""Block-wise adaptive caching (Ji et al. 2025): schedules, how they are found, what they cost."""
