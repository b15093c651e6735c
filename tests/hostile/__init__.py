"""Files made to harm whoever loads them: one table per kind, one row per attack. All they would do is touch a file.

To add a kind, write a table of ``Attack`` in a module of its own and name it in ``corpus``.
"""
