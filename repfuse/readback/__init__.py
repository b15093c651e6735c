"""A file that was written, read again: in a fresh Python process, which knows of it only what a user would."""
