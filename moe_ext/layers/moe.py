"""MoE: router, experts of fixed capacity, optional shared expert; and the load-balancing loss.

Shapes: T tokens, K choices, E experts (e on this rank), D = hidden_size, R rows given to the experts of this rank.
"""

import torch
import torch.distributed as dist

from moe_ext import ops
from moe_ext.layers import common, mlp, mpu, router, sharedexpert_registry
from moe_ext.layers.all_to_all import all_to_all
from moe_ext.layers.arguments import Arguments

# (tokens_per_expert [E] of this rank, scores [T,E]) of each layer that ran in training since the last clear.
_LOAD_BALANCING_LOSS = []


def save_load_balancing_loss(loss):
    _LOAD_BALANCING_LOSS.append(loss)


def get_load_balancing_loss():
    return _LOAD_BALANCING_LOSS


def clear_load_balancing_loss():
    """Forget what the layers saved; call it once per step."""
    _LOAD_BALANCING_LOSS.clear()


def batched_load_balancing_loss(args: Arguments):
    """moe_loss_weight / num_layers * sum over layers of E/(T*K) * sum_e count_e * mean_t scores[t,e]: a scalar of at
    least fp32, zero for zero tokens. ValueError unless each layer of this pipeline stage saved once."""
    if args.moe_loss_weight == 0:
        return 0.0
    layers = args.num_layers_per_virtual_pipeline_stage
    if layers is None:
        layers = args.num_layers // args.pipeline_model_parallel_size
    saved = get_load_balancing_loss()
    if len(saved) != layers:
        raise ValueError(
            f"batched_load_balancing_loss: {len(saved)} layers saved their statistics, {layers} were expected "
            f"(num_layers={args.num_layers}, pipeline_model_parallel_size={args.pipeline_model_parallel_size}, "
            f"num_layers_per_virtual_pipeline_stage={args.num_layers_per_virtual_pipeline_stage}). Layers save in "
            "training mode only; call clear_load_balancing_loss() after each step."
        )
    losses = [ops.balance_loss(scores_TE, counts_E.unsqueeze(0), args.moe_top_k) for counts_E, scores_TE in saved]
    return args.moe_loss_weight / args.num_layers * torch.stack(losses).sum()


class ParallelMLP(torch.nn.Module):
    """The experts and the output bias: the unit to wrap for sharded data parallelism.

    forward(x [..., D], scores [T,E], expert_weights [T,K], top_experts [T,K]) -> y like x;
    (y, bias) if args.bias and args.return_bias, y + bias if only args.bias.
    The experts are plain MLPs whatever args.mlp_type says, as in MegaBlocks; dMoE has gated ones.
    """

    def __init__(self, args: Arguments):
        super().__init__()
        self.args = args
        self.num_experts = args.moe_num_experts
        self.top_k = args.moe_top_k
        self.mlp = mlp.MLP(args)
        if args.bias:
            self.bias = torch.nn.Parameter(torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args)))
        else:
            self.register_parameter("bias", None)
        self.forward_fn = self.parallel_forward_once if args.moe_expert_model_parallelism else self.forward_once

    def expert_capacity(self, tokens: int) -> int:
        """Rows for each expert if every rank has `tokens` tokens; 0 means that nothing is dropped."""
        world = mpu.get_expert_parallel_world_size(self.args)
        return int(self.args.moe_capacity_factor * (self.top_k * tokens * world / self.num_experts))

    def load_balancing_loss(self, tokens_per_expert, expert_scores):
        """E/(T*K) * sum_e count_e * mean_t scores[t,e] of one layer."""
        return ops.balance_loss(expert_scores, tokens_per_expert.unsqueeze(0), self.top_k)

    def permute_and_compute(self, x_RD, weights_RK, index, capacity):
        """y_r = sum_k s_rk MLP_e(x_r). Copies beyond an expert's capacity, in flat order, count as zeros."""
        capacity = capacity or int(index.counts_E.max())
        top_k = weights_RK.shape[1]
        x_ECD = ops.binned_gather(x_RD, index.order_N, index.bins_E, capacity, top_k)
        return ops.binned_scatter(self.mlp(x_ECD), index.order_N, weights_RK.flatten(), index.bins_E, top_k)

    def forward_once(self, x_TD, weights_TK, ids_TK):
        index = ops.route_index(ids_TK, self.num_experts)
        return self.permute_and_compute(x_TD, weights_TK, index, self.expert_capacity(len(x_TD))), index.counts_E

    def parallel_forward_once(self, x_TD, weights_TK, ids_TK):
        """The same with the experts on P ranks: each copy travels to the rank of its expert and back.

        Where P > E, several ranks own features of one expert: a copy goes to each of them and their results are added.
        """
        args, group = self.args, self.args.expert_parallel_group
        world, shards = mpu.get_expert_parallel_world_size(args), mpu.hidden_sharding_degree(args)
        experts = mpu.experts_per_rank(args)

        index = ops.route_index(ids_TK, self.num_experts)
        sent_Pe = index.counts_E.repeat(shards).view(world, experts)
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe, group=group)
        send, receive = sent_Pe.sum(1).tolist(), received_Pe.sum(1).tolist()

        copies_ND = ops.gather(x_TD, index.order_N, None, index.bins_E, self.top_k)
        x_RD, handle = all_to_all(ops.repeat(copies_ND, (shards, 1)), receive, send, group, async_op=True)
        # Each rank's rows arrive sorted by expert; here they are sorted over all ranks.
        ids_R = torch.arange(experts, device=x_TD.device).repeat(world).repeat_interleave(received_Pe.flatten())
        local = ops.route_index(ids_R.unsqueeze(1), experts)
        handle.wait()

        y_RD = self.permute_and_compute(x_RD, x_RD.new_ones(len(x_RD), 1), local, self.expert_capacity(len(x_TD)))
        y_ND, _ = all_to_all(y_RD, send, receive, group)
        y_ND = ops.sum(y_ND.view(shards, -1, args.hidden_size), dim=0)
        y_TD = ops.scatter(y_ND, index.order_N, None, weights_TK.flatten(), index.bins_E, self.top_k)
        return y_TD, index.counts_E

    def forward(self, x, scores, expert_weights, top_experts):
        y_TD, tokens_per_expert = self.forward_fn(x.reshape(-1, x.shape[-1]), expert_weights, top_experts)
        if self.training and self.args.moe_loss_weight > 0:
            save_load_balancing_loss((tokens_per_expert, scores))
        y = y_TD.view(x.shape)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class MoE(torch.nn.Module):
    """A Mixture-of-Experts layer that drops the copies beyond an expert's capacity.

    x [..., hidden_size] -> what ParallelMLP returns. ValueError if x has another width, TypeError if it has another
    dtype than the layer and autocast is off.
    """

    def __init__(self, args: Arguments):
        super().__init__()
        self.router = router.LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert = sharedexpert_registry.get(args) if args.shared_expert else None

    def _init_experts_mlp(self, args: Arguments):
        return ParallelMLP(args)

    def forward(self, x):
        x = common.cast_if_autocast_enabled(x)
        width, dtype = self.router.layer.in_features, self.router.layer.weight.dtype
        if x.shape[-1] != width:
            raise ValueError(f"{type(self).__name__}: x {tuple(x.shape)} must end in hidden_size={width}")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{type(self).__name__}: x is {x.dtype}, the layer {dtype}. The default is Arguments(fp16=True): pass "
                "fp16=False for torch's default dtype (with bf16=True for bfloat16), or convert x or the layer."
            )
        scores, expert_weights, top_experts = self.router(x)
        out = self.experts(x, scores, expert_weights, top_experts)
        if self.shared_expert is None:
            return out
        return self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), out)
