"""Which part of the experts a rank owns under expert parallelism.

The P ranks of the group share E experts of F features: first the experts, min(P, E) ways, then, if P > E, the features
of each expert, P // E ways. Rank r owns expert block r % expert_sharding_degree and feature block
r // expert_sharding_degree.
"""

import torch
import torch.distributed as dist

from moe_ext.layers.arguments import Arguments


def get_expert_parallel_world_size(args: Arguments) -> int:
    return dist.get_world_size(args.expert_parallel_group) if args.moe_expert_model_parallelism else 1


def get_expert_parallel_rank(args: Arguments) -> int:
    return dist.get_rank(args.expert_parallel_group) if args.moe_expert_model_parallelism else 0


def expert_sharding_degree(args: Arguments) -> int:
    """Into how many blocks the experts are divided. ValueError if they do not divide."""
    degree = min(get_expert_parallel_world_size(args), args.moe_num_experts)
    if args.moe_num_experts % degree:
        raise ValueError(f"cannot share moe_num_experts={args.moe_num_experts} among {degree} ranks: use a divisor")
    return degree


def hidden_sharding_degree(args: Arguments) -> int:
    """Into how many blocks the features of an expert are divided. ValueError if they do not divide."""
    world = get_expert_parallel_world_size(args)
    degree = world // expert_sharding_degree(args)
    if args.ffn_hidden_size % degree:
        raise ValueError(f"cannot share ffn_hidden_size={args.ffn_hidden_size} among {degree} ranks: use a multiple")
    if expert_sharding_degree(args) * degree != world:
        raise ValueError(f"{world} ranks cannot share {args.moe_num_experts} experts evenly: use a multiple of them")
    return degree


def experts_per_rank(args: Arguments) -> int:
    return args.moe_num_experts // expert_sharding_degree(args)


def features_per_rank(args: Arguments) -> int:
    return args.ffn_hidden_size // hidden_sharding_degree(args)


# Parameters of experts carry the attribute `expert_model_parallel`: True where each rank holds its own part.


def is_moe_param(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "expert_model_parallel")


def param_is_expert_model_parallel(param: torch.Tensor) -> bool:
    return getattr(param, "expert_model_parallel", False)


def set_expert_model_parallel_attributes(tensor: torch.Tensor, is_parallel: bool):
    tensor.expert_model_parallel = is_parallel


def copy_expert_model_parallel_attributes(destination_tensor: torch.Tensor, source_tensor: torch.Tensor):
    if is_moe_param(source_tensor):
        destination_tensor.expert_model_parallel = source_tensor.expert_model_parallel


def synchronized_print(group, *x):
    """Print from each rank of the group in turn."""
    for rank in range(dist.get_world_size(group)):
        dist.barrier(group)
        if rank == dist.get_rank(group):
            print(f"rank = {rank}", *x)
