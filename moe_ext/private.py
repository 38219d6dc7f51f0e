"""The private names of torch that moe_ext uses: all of them, by what needs them. A later torch may drop any.

    require("moe_ext.ops")      # at import, or before the first step: ImportError, in a sentence, if torch lacks a name
"""
from operator import attrgetter

import torch

TRIED = "2.11.0, 2.13.0, 2.14.1 and 2.15.0"     # with what result: docs/torch.md
NAMES = {
    "moe_ext.ops": (
        "torch._C.DispatchKey",
        "torch._C.DispatchKeySet",
        "torch._C._AutoDispatchBelowAutograd",
        "torch._C._ExcludeDispatchKeyGuard",
        "torch._C._after_autograd_keyset",
        "torch._C._any_requires_grad",
        "torch._C._are_functorch_transforms_active",
        "torch._C._is_fwd_grad_enabled",
        "torch._functorch.utils.enable_single_level_autograd_function",
        "torch.autograd.forward_ad._current_level",
        "torch.autograd.function._SingleLevelFunction",
        "torch.ops.aten.add.Tensor._opname",    # of any op
        "torch.ops.aten.add.Tensor._schema",
    ),
    "moe_ext.layers": (
        "torch._C._current_autograd_node",
        "torch._C._current_graph_task_id",
        "torch.nn.Module._apply",
    ),
    "moe_ext.optim": ("torch._foreach_mul_",),
    "train.memory_snapshot": ("torch.cuda.memory._dump_snapshot", "torch.cuda.memory._record_memory_history"),
    "moe_ext.proof": ("torch._dynamo",),
    "mesh.attention gather": (
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "moe_ext.check.live": (
        "torch.UntypedStorage._cdata",
        "torch.utils._python_dispatch.TorchDispatchMode",
        "torch.utils._pytree.tree_leaves",
    ),
}


def require(user: str) -> None:
    """ImportError if this torch lacks one of NAMES[user]."""
    for name in NAMES[user]:
        try:
            attrgetter(name.removeprefix("torch."))(torch)
        except AttributeError:
            raise ImportError(
                f"{user} needs {name}, which torch {torch.__version__} does not have. moe_ext was tried with torch "
                f"{TRIED}: install one of them, or a newer moe_ext"
            ) from None
