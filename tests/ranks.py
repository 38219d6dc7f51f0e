"""Ranks for tests; see moe_ext.parallel.ranks."""

from moe_ext.parallel.ranks import fork, run_ranks

__all__ = ["fork", "run_ranks"]
