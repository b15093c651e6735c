"""Timing of any two networks against each other. It knows nothing of plans, checkpoints or the command line."""
