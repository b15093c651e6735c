"""Timing of any two networks against each other. It knows nothing of checkpoints or the CLI."""
