"""A file that was written, read again: in a fresh Python process, which knows of it only what a user would.

``python -m repfuse.readback`` is that process: a job comes in on its standard input, an answer goes out. Where no such
process can be had, the same is done in this one, and said. Nothing is imported here: the process starts sooner.
"""
