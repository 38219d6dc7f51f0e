"""Mixture-of-Experts layers with MegaBlocks' names, arguments, state dict and random-number order."""

from moe_ext.layers import fused, gelu, saved  # the other modules come with these two classes
from moe_ext.layers.dmoe import dMoE
from moe_ext.layers.moe import MoE

__all__ = ["MoE", "dMoE", "fused", "gelu", "saved"]
