"""Learning from preferences: of two segments that a policy has shown, which one is better."""
