"""Arguments: everything that a layer of this package can be told, under MegaBlocks' names.

Fields that change nothing here are kept so that existing configurations load:
  memory_optimized_mlp, remat_act_fn   only the input and the pre-activation are ever saved
  mlp_impl                             "grouped" and "sparse" reach the same kernels and give the same bits
  moe_lbl_in_fp32, moe_zloss_in_fp32   both losses are computed in at least fp32 always
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import moe_ext

InitFn = Callable[[torch.Tensor], Any]

DEFAULT_ACTIVATION_FN = partial(F.gelu, approximate="tanh")
DEFAULT_INIT_METHOD = partial(torch.nn.init.normal_, mean=0.0, std=0.02)


def current_device():
    """The current CUDA device, or the CPU where the ops do not run on one."""
    return torch.device("cuda", torch.cuda.current_device()) if moe_ext.has_cuda() else torch.device("cpu")


@dataclasses.dataclass
class Arguments:
    """One layer. Widths and counts are in elements.

    Note the default fp16=True, which is MegaBlocks': parameters are float16 unless fp16=False. With fp16=False and
    bf16=False they have torch's default dtype.
    """

    # model
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1  # the balance loss is divided by it
    bias: bool = True  # one output bias [hidden_size]; the experts themselves have none
    return_bias: bool = True  # return (y, bias) instead of y + bias
    activation_fn: Callable | None = DEFAULT_ACTIVATION_FN  # any elementwise one; GELU (both), SiLU, ReLU are fused

    # mixture of experts
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_capacity_factor: int | float = 1  # MoE only; 0 drops nothing
    moe_normalize_expert_weights: int | float | None = None  # p: divide the weights of a token by their p-norm
    moe_loss_weight: float = 0.1
    moe_jitter_eps: float | None = None
    moe_lbl_in_fp32: bool = False

    # parallelism
    moe_expert_model_parallelism: bool = False
    expert_parallel_group: dist.ProcessGroup | None = None  # None: all ranks
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None

    # computation
    memory_optimized_mlp: bool = False
    mlp_type: str = "mlp"  # or "glu": act(x w1^T) * (x v1^T)
    mlp_impl: str = "grouped"  # or "sparse"

    # initial values
    fp16: bool = True
    bf16: bool = False
    device: int | str | torch.device = dataclasses.field(default_factory=current_device)
    init_method: InitFn = DEFAULT_INIT_METHOD
    output_layer_init_method: InitFn = DEFAULT_INIT_METHOD

    # benchmarks: token t, slot k goes to expert (t*top_k + k) mod num_experts, its weight stays
    uniform_expert_assignment: bool = False

    # shared expert
    shared_expert: bool = False
    fc_cls: Any = torch.nn.Linear
    fc_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    remat_act_fn: bool = True
    shared_expert_hidden_size: int | None = None  # None: ffn_hidden_size
    shared_expert_weighted_sum: bool = False  # shared/(k+1) + experts*k/(k+1) instead of their sum

    # router z-loss
    moe_zloss_weight: float = 0
    moe_zloss_in_fp32: bool = False

    def __post_init__(self):
        if self.shared_expert_hidden_size is None:
            self.shared_expert_hidden_size = self.ffn_hidden_size


def from_megatron(megatron_args: Any) -> Arguments:
    """Arguments with the value of every attribute of `megatron_args` that has a field's name."""
    names = [field.name for field in dataclasses.fields(Arguments)]
    return Arguments(**{name: getattr(megatron_args, name) for name in names if hasattr(megatron_args, name)})
