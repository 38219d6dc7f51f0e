"""dMoE: the dropless layer. Every copy is computed, by one fused kernel from rows to weighted rows."""

from moe_ext import ops
from moe_ext.layers import dmlp_registry, moe, mpu
from moe_ext.layers.activation_fn import kernel_name
from moe_ext.layers.arguments import Arguments


class ParallelDroplessMLP(moe.ParallelMLP):
    """ParallelMLP without a capacity; args.mlp_type chooses plain or gated experts."""

    def __init__(self, args: Arguments):
        super().__init__(args)  # draws a capacity layer's weights too, as MegaBlocks does: one seed, the same layer
        self.hidden_size = args.hidden_size
        self.ffn_hidden_size = mpu.features_per_rank(args)
        self.mlp = dmlp_registry.get(args)

    def within_capacity(self, index, ids_RK, tokens):
        return index

    def permute_and_compute(self, x_RD, weights_RK, index):
        """y_r = sum_k s_rk MLP_e(x_r): fused if kernel_name knows the activation, else in three steps."""
        act = kernel_name(self.args.activation_fn, self.mlp.gated)
        if act is not None:
            gate, up, down = self.mlp.matrices()
            return ops.expert_mlp(x_RD, gate, up, down, weights_RK, index, act=act)
        top_k = weights_RK.shape[1]
        x_ND = ops.gather(x_RD, index.order_N, None, index.bins_E, top_k)
        y_ND = self.mlp(x_ND, index.counts_E)
        return ops.scatter(y_ND, index.order_N, None, weights_RK.flatten(), index.bins_E, top_k)


class dMoE(moe.MoE):
    """A Mixture-of-Experts layer that drops nothing; else as MoE, and args.mlp_type chooses plain or gated experts."""

    def _init_experts_mlp(self, args: Arguments):
        return ParallelDroplessMLP(args)
