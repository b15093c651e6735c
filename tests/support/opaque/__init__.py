"""Random networks of blocks in and around forwards that no symbolic trace can follow."""

from support.opaque.networks import network

__all__ = ["network"]
