"""regions -> edits: in which module each fused convolution lives, and what becomes of that module."""
