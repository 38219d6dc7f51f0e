"""What cannot be had by writing `moe_ext` for `megablocks` in an import.

The rest can: MegaBlocks' names, arguments and state dicts are those of
  moe_ext           MoE, dMoE, ParallelMLP, ParallelDroplessMLP, MLP, SparseMLP, SparseGLU, Arguments,
                    get_load_balancing_loss
  moe_ext.ops       all 15 of megablocks.ops
  moe_ext.layers    arguments, moe, dmoe, mlp, glu, router, mpu, common, dmlp_registry, sharedexpert_registry,
                    all_to_all, activation_fn, gelu
The layers' forward(x) also takes a token_mask.

Here are
  ops.gmm, backend.gmm   the two functions of the package grouped_gemm, whose fourth arguments differ, in any floating
                         dtype; `from moe_ext import compat as grouped_gemm` (or as megablocks' grouped_gemm_util)
  install()              makes `import megablocks` and `import grouped_gemm` find this package, for code that is not
                         yours to edit

What MegaBlocks has and this package has not: stk's block-sparse matrices (the experts' MLPs take tokens_per_expert in
both implementations), the kernel launchers of megablocks.backend.kernels and the compiled module megablocks_ops (their
callers are the functions of moe_ext.ops).

Where the layers differ on purpose:
  top-k               the lowest expert id wins a tie
  mlp_impl            "grouped" is the default; "sparse" knows no block sizes; both give the same bits
  expert parallelism  the capacity is int(factor * K*T / E) for the T tokens of all ranks, so that ranks drop what one
                      process drops; MegaBlocks' is K * (feature shards) times that
  saved statistics    in training with gradients on only, not by a recomputation in backward; MegaBlocks also saves the
                      logits for the z-loss in evaluation. A layer keeps its last 16 forwards (layers.saved.KEPT), so
                      that nothing grows if nobody clears; get_load_balancing_loss() gives a new list of what there is.
                      In torch.compile(fullgraph=True) over torch.utils.checkpoint, saving is a side effect that needs
                      torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
  checkpointing       use_reentrant=True is refused, where MegaBlocks' losses silently have no gradient
  refused             moe_normalize_expert_weights with moe_top_k=1, which gives the router no gradient; MoE with
                      mlp_type="glu", which changes nothing but a shared expert
  balance loss, z     in fp32 or fp64 always: no count is lost in half precision; zero tokens give zero
  shared expert       has the layer's dtype if fc_cls is Linear; works with return_bias, whose bias it weighs too
  from_megatron       an unset shared_expert_hidden_size follows ffn_hidden_size
  fp64                is fp64 throughout
  dtype of x          TypeError with advice if it is not the layer's
  bad input of an op  ValueError on a wrong shape, and RuntimeError where MegaBlocks reads out of bounds
"""

import importlib
import sys
from types import ModuleType

import torch

from moe_ext import ops as _kernels


def _bins(name, a, batch_sizes):
    if batch_sizes.device.type == "cpu" and int(batch_sizes.sum()) != len(a):
        raise ValueError(f"{name}: batch_sizes sum to {int(batch_sizes.sum())}, but a has {len(a)} rows")
    return batch_sizes.cumsum(0).to(a.device, torch.int32)


def _gmm(a, b, batch_sizes, trans_b=False):
    """y[rows of e] = a[rows of e] @ b[e], differentiable in a and b.

    a [R,I], b [E,I,O] ([E,O,I] if trans_b), batch_sizes [E] integers on any device -> [R,O].
    ValueError if batch_sizes do not sum to R.
    """
    return _kernels.grouped_gemm(a, b.transpose(1, 2) if trans_b else b, _bins("gmm", a, batch_sizes))


def _backend_gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    """ops.gmm, or with trans_a the weight gradient a[rows of e]^T @ b[rows of e] -> [E,I,O] of a [R,I], b [R,O].

    The result is written to c if given. Not differentiable.
    """
    if trans_a and trans_b:
        raise ValueError("backend.gmm: trans_a and trans_b exclude each other")
    with torch.no_grad():
        if trans_a:
            y = _kernels.grouped_gemm_wgrad(a, b, _bins("backend.gmm", a, batch_sizes))
        else:
            y = _gmm(a, b, batch_sizes, trans_b)
        return y if c is None else c.copy_(y)


def _module(name, **contents):
    module = ModuleType(name, __doc__)
    vars(module).update(contents)
    return module


ops = _module("grouped_gemm.ops", gmm=_gmm)
backend = _module("grouped_gemm.backend", gmm=_backend_gmm)


def grouped_gemm_is_available():
    return True


def assert_grouped_gemm_is_available():
    pass


_NAMES = {
    "moe": ["MoE", "ParallelMLP", "get_load_balancing_loss"],
    "dmoe": ["dMoE", "ParallelDroplessMLP"],
    "mlp": ["MLP", "SparseMLP"],
    "glu": ["SparseGLU"],
    "arguments": ["Arguments"],
    "router": [], "common": [], "mpu": [], "all_to_all": [], "activation_fn": [], "gelu": [],
    "dmlp_registry": [], "sharedexpert_registry": [],
}  # fmt: skip


def install():
    """From now on `import megablocks` and `import grouped_gemm`, and their modules, mean this package.

    Call it before anything imports them: RuntimeError if another megablocks or grouped_gemm is loaded.
    """
    this = sys.modules[__name__]
    if sys.modules.get("grouped_gemm") is this:
        return
    for name in ("megablocks", "grouped_gemm"):
        if name in sys.modules:
            raise RuntimeError(f"compat.install: {name} is already imported; call install() before anything imports it")
    layers = importlib.import_module("moe_ext.layers")
    megablocks = _module("megablocks", __path__=[], ops=_kernels, layers=layers, grouped_gemm_util=this)
    for name, contents in _NAMES.items():
        module = importlib.import_module(f"moe_ext.layers.{name}")
        sys.modules[f"megablocks.layers.{name}"] = module
        vars(megablocks).update({key: getattr(module, key) for key in contents})
    sys.modules.update({
        "megablocks": megablocks,
        "megablocks.ops": _kernels,
        "megablocks.layers": layers,
        "megablocks.grouped_gemm_util": this,
        "grouped_gemm": this,
        "grouped_gemm.ops": ops,
        "grouped_gemm.backend": backend,
    })  # fmt: skip
