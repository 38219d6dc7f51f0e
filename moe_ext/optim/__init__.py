"""Optimizers on any mesh: AdamW, Muon, Shampoo by a rule; gradient clipping, loss scaling, learning-rate schedules."""
from moe_ext.optim.clip import NonFiniteGradient, clip_grad_norm, count_zeros, parameter_norm
from moe_ext.optim.groups import build_optimizer, param_groups
from moe_ext.optim.muon import Muon, newton_schulz
from moe_ext.optim.scaler import LossScaler
from moe_ext.optim.schedule import cosine, learning_rate, set_learning_rate, wsd
from moe_ext.optim.shampoo import Shampoo, inverse_root

__all__ = ["LossScaler", "Muon", "NonFiniteGradient", "Shampoo", "build_optimizer", "clip_grad_norm", "cosine",
           "count_zeros", "inverse_root", "learning_rate", "newton_schulz", "param_groups", "parameter_norm",
           "set_learning_rate", "wsd"]
