"""Comparison of any two networks. It knows nothing of plans, checkpoints or the command line."""
