"""Affine maps: their geometry, their weights, and what can be made of them. No graphs here."""
