"""Sweeps over runs and comparisons use what comparisons are tested with."""

from tests.comparison.conftest import cluster, home

__all__ = ["cluster", "home"]
