"""Ranks for tests; see moe_ext.parallel.ranks."""

from moe_ext.parallel.ranks import run_ranks

__all__ = ["run_ranks"]
