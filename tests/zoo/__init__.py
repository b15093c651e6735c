"""Whole networks of the model libraries, converted and proven one by one: `make zoo`."""
