"""Optimizers on any mesh: parameter groups, AdamW, gradient clipping, loss scaling and learning-rate schedules."""
from moe_ext.optim.clip import NonFiniteGradient, clip_grad_norm, count_zeros, parameter_norm
from moe_ext.optim.groups import adamw, param_groups
from moe_ext.optim.scaler import LossScaler
from moe_ext.optim.schedule import cosine, learning_rate, set_learning_rate, wsd

__all__ = ["LossScaler", "NonFiniteGradient", "adamw", "clip_grad_norm", "cosine", "count_zeros", "learning_rate",
           "param_groups", "parameter_norm", "set_learning_rate", "wsd"]
