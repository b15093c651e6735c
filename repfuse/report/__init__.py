"""What repfuse tells people: the report as data, and its renderings. Rendering alone; nothing is computed here.

No module in this package imports torch, so that `repfuse explain` answers at once.
"""
