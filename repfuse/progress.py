"""How long work says how far it is. It knows no torch."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Is told the stage, and the fraction of the whole that is done."""
