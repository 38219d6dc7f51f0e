"""The experts' MLPs: y = act(x w1_e^T) w2_e for the rows of each expert e, and the shared expert.

Layouts, per rank: e experts of F features, D = hidden_size.
  MLP                    w1 [e,D,F]    w2 [e,F,D]    rows come in bins [e,C,D]
  SparseMLP, GroupedMLP  w1 [e*F,D]    w2 [e*F,D]    rows come sorted by expert
The whole matrices are drawn on every rank and then cut, so that one seed gives one model on any number of ranks.
"""

import torch

from moe_ext import ops
from moe_ext.layers import common, mpu
from moe_ext.layers.activation_fn import act_fn
from moe_ext.layers.arguments import Arguments, InitFn
from moe_ext.ops.define import Function


class ScaleGradient(Function):
    """y = x, dx = scale * dy."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.scale, None


scale_gradient = ScaleGradient.apply


def resolve_dtensor(weight):
    """This rank's part of a DTensor; any other tensor as it is."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


@torch.no_grad()
def create_moe_expert_weights(args: Arguments, init_method: InitFn):
    """This rank's part [e,F,D] of a matrix [E,F,D] over all ranks, filled by init_method."""
    size = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
    w_EFD = torch.empty(size, device=args.device, dtype=common.dtype(args))
    init_method(w_EFD)
    f_block, e_block = divmod(mpu.get_expert_parallel_rank(args), mpu.expert_sharding_degree(args))
    e, f = mpu.experts_per_rank(args), mpu.features_per_rank(args)
    return w_EFD[e_block * e : (e_block + 1) * e, f_block * f : (f_block + 1) * f]


class ExpertWeights(torch.nn.Module):
    """What every MLP of experts has: how its matrices are marked and read."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args

    def parameter(self, values):
        """A parameter of its own memory, marked for mpu."""
        weight = torch.nn.Parameter(values.clone(memory_format=torch.contiguous_format))
        mpu.set_expert_model_parallel_attributes(weight, self.args.moe_expert_model_parallelism)
        return weight

    def local(self, weight):
        """The weight for the kernels. Under expert parallelism its gradient is divided by the number of ranks: it is
        already a sum over the tokens of all ranks, and data parallelism averages over ranks."""
        if self.args.moe_expert_model_parallelism:
            weight = scale_gradient(weight, 1 / mpu.get_expert_parallel_world_size(self.args))
        return resolve_dtensor(weight)


class MLP(ExpertWeights):
    """x [e,C,D] -> [e,C,D]: the experts of a layer with fixed capacity."""

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.w1 = self.parameter(create_moe_expert_weights(args, args.init_method).transpose(1, 2))
        self.w2 = self.parameter(create_moe_expert_weights(args, args.output_layer_init_method))

    def forward(self, x_ECD):
        E, C, _ = x_ECD.shape
        bins_E = C * torch.arange(1, E + 1, dtype=torch.int32, device=x_ECD.device)
        return self.rows(x_ECD.flatten(0, 1), bins_E).view(x_ECD.shape)

    def rows(self, x_ND, bins_E):
        """The same for rows sorted by expert, which end at bins_E: zeros behind them."""
        h_NF = ops.grouped_gemm(x_ND, self.local(self.w1), bins_E)
        return ops.grouped_gemm(self.args.activation_fn(h_NF), self.local(self.w2), bins_E)


class SparseMLP(ExpertWeights):
    """x [N,D] sorted by expert, tokens_per_expert [e] -> [N,D]: the experts of a dropless layer."""

    gated = False

    def __init__(self, args: Arguments):
        super().__init__(args)
        self.w1 = self.parameter(create_moe_expert_weights(args, args.init_method).flatten(0, 1))
        self.w2 = self.parameter(create_moe_expert_weights(args, args.output_layer_init_method).flatten(0, 1))

    def by_expert(self, weight):
        return self.local(weight).view(mpu.experts_per_rank(self.args), -1, self.args.hidden_size)

    def matrices(self):
        """gate [e,F,D], up [e,F,D] or None, down [e,D,F] of ops.expert_mlp: views, no copies."""
        return self.by_expert(self.w1), None, self.by_expert(self.w2).transpose(1, 2)

    def forward(self, x_ND, tokens_per_expert):
        bins_E = tokens_per_expert.to(x_ND.device).cumsum(0, dtype=torch.int32)
        gate, up, down = self.matrices()
        h_NF = act_fn(ops.grouped_gemm(x_ND, gate.transpose(1, 2), bins_E), self.args.activation_fn)
        if up is not None:
            h_NF = h_NF * ops.grouped_gemm(x_ND, up.transpose(1, 2), bins_E)
        return ops.grouped_gemm(h_NF, down.transpose(1, 2), bins_E)


class GroupedMLP(SparseMLP):
    pass


class SharedMLP(torch.nn.Module):
    """The expert that every token visits: down_proj(act(up_proj(x)))."""

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.fc_kwargs = {"bias": args.bias, "device": args.device}
        if args.fc_cls is torch.nn.Linear:  # another class may not know the word
            self.fc_kwargs["dtype"] = common.dtype(args)
        self.fc_kwargs.update(args.fc_kwargs)
        self.up_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(args.shared_expert_hidden_size, args.hidden_size, **self.fc_kwargs)
        self.down_proj._is_residual = True  # read by initialisers that scale residual projections

    def add_experts_sharedexpert(self, shared_expert_out, expert_out):
        """The sum, or shared/(k+1) + experts*k/(k+1). If expert_out is (y, bias) then so is the result."""
        k = self.args.moe_top_k
        shared, share = (1 / (k + 1), k / (k + 1)) if self.args.shared_expert_weighted_sum else (1, 1)
        if isinstance(expert_out, tuple):
            y, bias = expert_out
            return shared * shared_expert_out + share * y, share * bias
        return shared * shared_expert_out + share * expert_out

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))
