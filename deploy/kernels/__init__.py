"""Implementations of the numbers that `docs/numerics.md` defines."""
