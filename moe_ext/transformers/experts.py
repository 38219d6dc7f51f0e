"""transformers' experts, computed by moe_ext: the implementation "moe_ext" of its ExpertsInterface.

    y_t = sum_k weights_tk * down_e(act(up_e x_t)), e = top_k_index_tk, as the module's own forward ("eager") computes

The module says what it is by has_gate, has_bias, is_transposed, is_concatenated, has_post_expert_norm, act_fn and
_apply_gate. Where its activation is one of ours (silu, gelu, relu; gated: silu, gelu, gpt-oss's clamped one), it is one
fused op, ops.expert_mlp, which reads and trains the weights in whatever layout the model keeps them, transposed and
interleaved too, without a copy. Any other activation, gate or norm is the module's own code between two grouped
products. Weights of another dtype than the hidden states decide the dtype of the products, as under "grouped_mm".
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from moe_ext import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {
    F.silu: "silu",
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    F.relu: "relu",
    nn.ReLU: "relu",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
# Classes whose own _apply_gate is gpt-oss's if these two attributes have gpt-oss's values.
CLAMPED = {
    "GptOssExperts": ("alpha", "limit"),
    "OpenAIPrivacyFilterExperts": ("alpha", "limit"),
    "MiniMaxM3VLExperts": ("swiglu_alpha", "swiglu_limit"),
}
CLAMPED_VALUES = (1.702, 7.0)  # of "swiglu_oai"


def fused_act(experts):
    """The name in ops.expert_mlp of what the module does between its products, None if it has none."""
    if experts.has_post_expert_norm:
        return None
    if experts.has_gate:
        owner = next(c for c in type(experts).__mro__ if "_apply_gate" in c.__dict__)
        if owner.__name__ in CLAMPED and owner.__module__.startswith("transformers.models."):
            alpha, limit = (getattr(experts, name) for name in CLAMPED[owner.__name__])
            return "swiglu_oai" if (alpha, limit) == CLAMPED_VALUES else None
        if owner._apply_gate is not _default_apply_gate or not experts.is_concatenated:
            return None
    act = experts.act_fn
    name = ACTIVATIONS.get(type(act) if isinstance(act, nn.Module) else act)
    return GATED.get(name) if experts.has_gate else name


def parameters_of(experts):
    """Up [E,U,D] and down [E,D,F] as views, their biases [E,U] and [E,D] or None; U = 2F with a gate."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    names = [name, "down_proj", *((f"{name}_bias", "down_proj_bias") if experts.has_bias else ())]
    found = [getattr(experts, n, None) for n in names]  # once: peft's are made when they are asked for
    for n, p in zip(names, found, strict=True):
        if not isinstance(p, torch.Tensor) or p.dtype not in FLOATS:
            kind = f"{p.dtype} {list(p.shape)}" if isinstance(p, torch.Tensor) else type(p).__name__
            raise TypeError(f"moe_ext cannot run {type(experts).__name__}: its {n} is {kind}, wanted a tensor of "
                            f"{', '.join(str(d)[6:] for d in FLOATS)}. Hint: "
                            'model.set_experts_implementation("eager")')  # fmt: skip
    up, down, *biases = found
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return up, down, *(biases or (None, None))


def experts_forward(experts, hidden_states, top_k_index, top_k_weights, *, num_copies=None):
    """hidden_states [T,D], top_k_index [T,K] integers, top_k_weights [T,K] -> [T,D] of the hidden states' dtype.

    Differentiable in hidden_states, top_k_weights and the module's parameters. In an expert-parallel module an index
    that is none of its own experts' (num_experts or -1) is skipped, with zeros for its gradients; elsewhere it is a
    RuntimeError. num_copies: how many are its own, where the caller knows. ValueError for other shapes, TypeError for a
    module whose parameters are none that it can run with.
    """
    if hidden_states.dim() != 2 or top_k_index.shape != top_k_weights.shape or len(hidden_states) != len(top_k_index):
        sizes = [list(t.shape) for t in (hidden_states, top_k_index, top_k_weights)]
        raise ValueError(f"moe_ext cannot run {type(experts).__name__}: hidden_states, top_k_index and top_k_weights "
                         f"are {sizes[0]}, {sizes[1]} and {sizes[2]}, wanted [T,D], [T,K] and [T,K]")
    up, down, up_bias, down_bias = parameters_of(experts)
    dtype = torch.promote_types(up.dtype, down.dtype)
    x = hidden_states.to(dtype)
    up, down, up_bias, down_bias = (None if p is None else p.to(dtype) for p in (up, down, up_bias, down_bias))
    weights, index = routed(experts, top_k_index, top_k_weights, len(up), dtype)
    act = fused_act(experts)
    if act is None:
        y = composed(experts, x, (up, up_bias), (down, down_bias), weights, index)
    else:
        if num_copies is None:
            num_copies = copies_of(experts, index)
        if not experts.is_concatenated:
            up = up.unflatten(1, (-1, 2)).transpose(1, 2)
            up_bias = None if up_bias is None else up_bias.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
        y = ops.expert_mlp(x, up, None, down, weights, index, act=act, gate_bias=up_bias, down_bias=down_bias,
                           num_copies=num_copies)  # fmt: skip
    return y.to(hidden_states.dtype)


def routed(experts, top_k_index, top_k_weights, num_experts, dtype):
    """-> the weights in the dtype that ops take beside products in `dtype`, and the routing index of this module's own
    experts."""
    if experts._is_expert_parallel:
        top_k_index = top_k_index.masked_fill(top_k_index >= num_experts, -1)
    weights = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return weights, ops.route_index(top_k_index, num_experts)


def copies_of(experts, index):
    """How many copies are this module's own; None: all."""
    return index.bins_E[-1].item() if experts._is_expert_parallel else None


def composed(experts, x_TD, up, down, weights_TK, index, scale=1.0):
    """The same with the module's own activation and norm. Rows of skipped copies come last and stay out of all sums.
    up, down: matrix and bias, and low-rank factors a and c with their scale if there are any (lora.py)."""
    order, bins, K = index.order_N, index.bins_E, weights_TK.shape[1]

    def linear(x_NI, w_EOI, bias_EO, a_ErI=None, c_EOr=None):
        y_NO = ops.grouped_gemm(x_NI, w_EOI.transpose(1, 2), bins)
        if a_ErI is not None:
            u_Nr = ops.grouped_gemm(x_NI, a_ErI.transpose(1, 2), bins) * scale
            y_NO = y_NO + ops.grouped_gemm(u_Nr, c_EOr.transpose(1, 2), bins)
        if bias_EO is None:
            return y_NO
        return y_NO + ops.grouped_gemm(x_NI.new_ones(len(x_NI), 1), bias_EO[:, None], bins)

    h_NU = linear(ops.gather(x_TD, order, None, bins, K), *up)
    y_ND = linear(experts._apply_gate(h_NU) if experts.has_gate else experts.act_fn(h_NU), *down)
    if experts.has_post_expert_norm:
        y_ND = experts.post_expert_norm(y_ND)
    return ops.scatter(y_ND, order, None, weights_TK.flatten(), bins, K)


ExpertsInterface.register("moe_ext", experts_forward)
