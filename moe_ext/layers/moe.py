"""MoE: router, experts of fixed capacity, optional shared expert; and the load-balancing loss.

The functions of the loss are MegaBlocks': layers save statistics in training with gradients on (saved.py), and a step
ends with clear_load_balancing_loss().

Shapes: T tokens, K choices, E experts (e on this rank), D = hidden_size, R rows given to the experts of this rank.
"""

import torch
import torch.distributed as dist

from moe_ext import ops
from moe_ext.layers import common, mlp, mpu, router, saved, sharedexpert_registry
from moe_ext.layers.all_to_all import all_to_all
from moe_ext.layers.arguments import Arguments

_saved_by_hand = []


def save_load_balancing_loss(loss):
    """For a layer of your own: add (tokens_per_expert [E], scores [T,E]) to what the layers of this package save."""
    _saved_by_hand.append(loss)


def get_load_balancing_loss():
    """A list of (tokens_per_expert [E] of this rank, scores [T,E]) for each layer that ran since the last clear."""
    return saved.read("balance loss", "clear_load_balancing_loss") + _saved_by_hand


def clear_load_balancing_loss():
    """Forget what the layers saved; call it once per step."""
    saved.clear("balance loss")
    _saved_by_hand.clear()


def batched_load_balancing_loss(args: Arguments):
    """moe_loss_weight / num_layers * sum over layers of E/(T*K) * sum_e count_e * mean_t scores[t,e]: a scalar of at
    least fp32, zero for zero tokens. ValueError unless each layer of this pipeline stage saved once."""
    if args.moe_loss_weight == 0:
        return 0.0
    layers = args.num_layers_per_virtual_pipeline_stage
    if layers is None:
        layers = args.num_layers // args.pipeline_model_parallel_size
    statistics = get_load_balancing_loss()
    if len(statistics) != layers:
        raise ValueError(
            f"batched_load_balancing_loss: {len(statistics)} layers saved their statistics, {layers} were expected "
            f"(num_layers={args.num_layers}, pipeline_model_parallel_size={args.pipeline_model_parallel_size}, "
            f"num_layers_per_virtual_pipeline_stage={args.num_layers_per_virtual_pipeline_stage}). Layers save in "
            "training mode with gradients on only (under activation checkpointing with use_reentrant=False only); call "
            "clear_load_balancing_loss() after each step."
        )
    losses = [ops.balance_loss(scores_TE, counts_E.unsqueeze(0), args.moe_top_k) for counts_E, scores_TE in statistics]
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
        self.saved = saved.Slot("balance loss")
        self.mlp = mlp.MLP(args)
        if args.bias:
            self.bias = torch.nn.Parameter(torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args)))
        else:
            self.register_parameter("bias", None)

    @property
    def forward_fn(self):
        return self.parallel_forward_once if self.args.moe_expert_model_parallelism else self.forward_once

    def expert_capacity(self, tokens: int) -> int:
        """Rows for each expert if every rank has `tokens` tokens; 0 means that nothing is dropped."""
        return self.capacity(tokens * mpu.get_expert_parallel_world_size(self.args))

    def capacity(self, tokens):
        """The same for `tokens` tokens on all ranks together, a number that torch.export may not know yet."""
        return torch.sym_int(self.args.moe_capacity_factor * (self.top_k * tokens / self.num_experts))

    def load_balancing_loss(self, tokens_per_expert, expert_scores):
        """E/(T*K) * sum_e count_e * mean_t scores[t,e] of one layer."""
        return ops.balance_loss(expert_scores, tokens_per_expert.unsqueeze(0), self.top_k)

    def within_capacity(self, index, ids_RK, tokens):
        """The index without the copies beyond an expert's capacity, in flat order. tokens: those of all ranks."""
        if not self.args.moe_capacity_factor:
            return index
        (R, K), experts = ids_RK.shape, index.counts_E.shape[0]
        capacity_1 = torch.full((1,), self.capacity(tokens), dtype=torch.int32, device=ids_RK.device)
        # None if it is 0: in tensors, because torch.export may not know yet whether it is.
        capacity_1 = torch.where(capacity_1 > 0, capacity_1, torch.full_like(capacity_1, R * K))
        return ops.route_index(ops.capacity_drop(ids_RK.int(), experts, capacity_1), experts)

    def permute_and_compute(self, x_RD, weights_RK, index):
        """y_r = sum_k s_rk MLP_e(x_r) over the copies that have a place in the index."""
        top_k = weights_RK.shape[1]
        x_ND = ops.gather(x_RD, index.order_N, None, index.bins_E, top_k)
        y_ND = self.mlp.rows(x_ND, index.bins_E)
        return ops.scatter(y_ND, index.order_N, None, weights_RK.flatten(), index.bins_E, top_k)

    def forward_once(self, x_TD, weights_TK, ids_TK):
        index = ops.route_index(ids_TK, self.num_experts)
        kept = self.within_capacity(index, ids_TK, x_TD.shape[0])
        return self.permute_and_compute(x_TD, weights_TK, kept), index.counts_E

    def parallel_forward_once(self, x_TD, weights_TK, ids_TK):
        """The same with the experts on P ranks: each copy travels to the rank of its expert and back.

        Where P > E, several ranks own features of one expert: a copy goes to each of them and their results are added.
        """
        args, group = self.args, self.args.expert_parallel_group
        world, shards = mpu.get_expert_parallel_world_size(args), mpu.hidden_sharding_degree(args)
        experts = mpu.experts_per_rank(args)

        index = ops.route_index(ids_TK, self.num_experts)
        counts_Pe = index.counts_E.repeat(shards).view(world, experts)
        sent = torch.cat([counts_Pe, counts_Pe.new_full((world, 1), len(x_TD))], dim=1)  # and how many tokens I have
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        received_Pe, tokens = received[:, :-1], int(received[:, -1].sum())
        send, receive = counts_Pe.sum(1).tolist(), received_Pe.sum(1).tolist()

        copies_ND = ops.gather(x_TD, index.order_N, None, index.bins_E, self.top_k)
        x_RD, handle = all_to_all(ops.repeat(copies_ND, (shards, 1)), receive, send, group, async_op=True)
        # Each rank's rows arrive sorted by expert; here they are sorted over all ranks.
        ids_R = torch.arange(experts, device=x_TD.device).repeat(world).repeat_interleave(received_Pe.flatten())
        ids_R1 = ids_R.unsqueeze(1)
        local = self.within_capacity(ops.route_index(ids_R1, experts), ids_R1, tokens)
        handle.wait()

        y_RD = self.permute_and_compute(x_RD, x_RD.new_ones(len(x_RD), 1), local)
        y_ND, _ = all_to_all(y_RD, send, receive, group)
        y_ND = ops.sum(y_ND.view(shards, -1, args.hidden_size), dim=0)
        y_TD = ops.scatter(y_ND, index.order_N, None, weights_TK.flatten(), index.bins_E, self.top_k)
        return y_TD, index.counts_E

    def forward(self, x, scores, expert_weights, top_experts):
        y_TD, tokens_per_expert = self.forward_fn(x.reshape(-1, x.shape[-1]), expert_weights, top_experts)
        if self.training and self.args.moe_loss_weight > 0:
            self.saved.add((tokens_per_expert, scores))
        y = y_TD.view(x.shape)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class MoE(torch.nn.Module):
    """A Mixture-of-Experts layer that drops the copies beyond an expert's capacity.

    x [..., hidden_size] -> what ParallelMLP returns. token_mask, bool [...], is True for the tokens that are there: the
    others neither route nor count, in capacity and losses too, and the experts give them zeros; a shared expert sees
    zeros there. To know how many they are takes one wait for the device, and under torch.compile(fullgraph=True) what
    x[token_mask] takes: torch._dynamo.config.capture_dynamic_output_shape_ops = True.

    ValueError if x or token_mask has another shape or args.mlp_type names experts that this layer has not; TypeError if
    token_mask is not bool, or x has another dtype than the layer and autocast is off.
    """

    def __init__(self, args: Arguments):
        super().__init__()
        self.router = router.LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert = sharedexpert_registry.get(args) if args.shared_expert else None

    def _init_experts_mlp(self, args: Arguments):
        if args.mlp_type != "mlp" and not args.shared_expert:
            raise ValueError(
                f"MoE: mlp_type={args.mlp_type!r} would change nothing: the experts of a layer with a capacity are "
                'plain MLPs. Use dMoE(args), or mlp_type="mlp".'
            )
        return ParallelMLP(args)

    def forward(self, x, token_mask=None):
        x = common.cast_if_autocast_enabled(x)
        self._check(x, token_mask)
        if token_mask is None:
            out = self._route(x)
        else:
            x = x.masked_fill(~token_mask.unsqueeze(-1), 0)     # NaN in a pad would reach the gradients
            out = self._route_some(x, token_mask)
        if self.shared_expert is None:
            return out
        return self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), out)

    def _route(self, x):
        scores, expert_weights, top_experts = self.router(x)
        return self.experts(x, scores, expert_weights, top_experts)

    def _route_some(self, x, token_mask):
        """The layer without the other tokens, and zeros for these."""
        rows_R = token_mask.flatten().nonzero().squeeze(1)
        out = self._route(x.flatten(0, -2).index_select(0, rows_R))
        y_RD, *bias = out if isinstance(out, tuple) else (out,)
        y = y_RD.new_zeros(token_mask.numel(), x.shape[-1]).index_copy(0, rows_R, y_RD).view(x.shape)
        return (y, *bias) if bias else y

    def _check(self, x, token_mask):
        name, width, dtype = type(self).__name__, self.router.layer.in_features, self.router.layer.weight.dtype
        if x.shape[-1] != width:
            raise ValueError(f"{name}: x {tuple(x.shape)} must end in hidden_size={width}")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"{name}: x is {x.dtype}, the layer {dtype}. The default is Arguments(fp16=True): pass "
                "fp16=False for torch's default dtype (with bf16=True for bfloat16), or convert x or the layer."
            )
        if token_mask is None:
            return
        if token_mask.dtype != torch.bool:
            raise TypeError(f"{name}: token_mask is {token_mask.dtype}, wanted torch.bool, True for a real token")
        if token_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}: token_mask {tuple(token_mask.shape)} must have the shape of x without its last dimension, "
                f"{tuple(x.shape[:-1])}"
            )
