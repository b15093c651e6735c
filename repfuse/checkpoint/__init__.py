"""Checkpoint files: recognised by content, read without running their code, written atomically."""
