"""Gated experts: y = (act(x w1_e^T) * (x v1_e^T)) w2_e. v1 has the layout of w1 and is drawn after w1 and w2."""

from moe_ext.layers.arguments import Arguments
from moe_ext.layers.mlp import SharedMLP, SparseMLP, create_moe_expert_weights


class SparseGLU(SparseMLP):
    gated = True

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.v1 = self.parameter(create_moe_expert_weights(args, args.init_method).flatten(0, 1))

    def matrices(self):
        gate, _, down = super().matrices()
        return gate, self.by_expert(self.v1), down


class GroupedGLU(SparseGLU):
    pass


class SharedGLU(SharedMLP):
    """down_proj(act(gate_proj(x)) * up_proj(x))."""

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
