"""LoRA on models of transformers: on their fused experts by grouped products, and on linear layers.

    add_lora(model, rank=8, alpha=16)           # factors; all else is frozen, as users of transformers expect
    save_lora(model, "adapter")                 # a folder that peft loads too; load_lora(model, "adapter") reads peft's
    merge_lora(model)                           # a plain model again: save_pretrained writes it as it would any

Each expert of gate_up_proj (up_proj without a gate) and of down_proj has factors of its own, gate_up_proj_lora_A
[E,r,in], gate_up_proj_lora_B [E,out,r] and so on; gate and up share an A, as in peft. W + B A is never formed; peft
forms it, of all experts, in every forward. Experts with factors run in our kernels, whatever experts implementation
the model has. Arithmetic and layers: moe_ext.layers.lora.

The file is that of peft 0.21 for target_modules and target_parameters: lora_A.weight [r*E,in], expert by expert, and
lora_B.weight [out,r*E], the experts of one column of B side by side. Parameters of one module are wrapped one around
the other there in the order in which the module has them, so that all but the last have base_layer in their names.
"""
import json
import re
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moe_ext.layers import lora
from moe_ext.layers.lora import computed_dtype, has_lora, is_factor, lora_state_dict, low_rank_expert_mlp
from moe_ext.transformers.experts import composed, copies_of, fused_act, parameters_of, routed

__all__ = ["add_lora", "load_lora", "lora_state_dict", "merge_lora", "save_lora"]

TARGETS = r"\.experts\.(gate_up_proj|up_proj|down_proj)$"
PREFIX = "base_model.model."


class LowRankFusedExperts:
    """What a module becomes that transformers' use_experts_implementation has decorated."""
    @staticmethod
    def pairs_of(experts):
        up = "gate_up_proj" if experts.has_gate else "up_proj"
        return {up: f"{up}_lora", "down_proj": "down_proj_lora"}

    def factor_shapes(self, name, rank):
        E, out, columns = getattr(self, name).shape
        out, columns = (columns, out) if self.is_transposed else (out, columns)
        return (E, rank, columns), (E, out, rank)

    def delta(self, name, A, B):
        return (B @ A).transpose(1, 2) if self.is_transposed else B @ A

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """As moe_ext.transformers.experts.experts_forward."""
        up, down, up_bias, down_bias = parameters_of(self)
        dtype = computed_dtype(hidden_states.to(torch.promote_types(up.dtype, down.dtype)))
        factors = (getattr(self, f"{pair}_{suffix}", None) for pair in self.pairs_of(self).values() for suffix in "AB")
        up, down, up_bias, down_bias, a13, c13, a2, c2 = (
            None if p is None else p.to(dtype) for p in (up, down, up_bias, down_bias, *factors))
        weights, index = routed(self, top_k_index, top_k_weights, len(up), dtype)
        x, act = hidden_states.to(dtype), fused_act(self)
        if act is None:     # for which autograd keeps more
            y = composed(self, x, (up, up_bias, a13, c13), (down, down_bias, a2, c2), weights, index, self.lora_scale)
        else:
            y = low_rank_expert_mlp(x, up, down, weights, index, a13=a13, c13=c13, a2=a2, c2=c2, b13=up_bias,
                                    b2=down_bias, scale=self.lora_scale, act=act, num_copies=copies_of(self, index),
                                    in_turns=self.has_gate and not self.is_concatenated)
        return y.to(hidden_states.dtype)


def kind(module: nn.Module) -> type | None:
    if all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "config")):
        return LowRankFusedExperts
    return lora.kind(module)


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16, targets: str = TARGETS, dropout: float = 0.0, *,
             seed: int = 0) -> list[str]:
    """Give low-rank factors to what `targets` finds (re.search) among the names of linear layers
    (model.layers.0.self_attn.q_proj) and of the experts' parameters (model.layers.0.mlp.experts.gate_up_proj), and
    freeze all else. -> the factors' names.

    The factors are float32, or float64 for float64, whatever the model's dtype; the rest is as in
    moe_ext.layers.lora.add_lora. Before DDP and fully_shard. Errors: ValueError, also for experts that transformers has
    spread over ranks, and for a model with adapters of peft, which would freeze.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("add_lora: the model has adapters of peft. Hint: merge_and_unload() first, or let peft adapt "
                         'the experts too; experts_implementation="moe_ext" runs them')
    names = [name for name, module in model.named_modules()
             if kind(module) is LowRankFusedExperts and (module._is_expert_parallel or sharded(module))]
    if names:
        raise ValueError(f"add_lora: {names[0]} is spread over ranks by transformers' parallelism, which knows no "
                         "factors. Hint: load without ep_size and tp_size, then FSDP2 or DDP")
    made = lora.add_lora(model, rank, alpha, targets, dropout, seed=seed, kind=kind)
    for name, p in model.named_parameters():
        p.requires_grad_(is_factor(name))
    if hasattr(model, "enable_input_require_grads"):    # else use_reentrant=True would leave the factors none
        model.enable_input_require_grads()
    return made


def sharded(module: nn.Module) -> bool:
    return any(hasattr(p, "placements") for p in module.parameters())


def merge_lora(model: nn.Module) -> None:
    """As moe_ext.layers.lora.merge_lora. What add_lora froze stays frozen."""
    lora.merge_lora(model)
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()


# ---- peft's file -----------------------------------------------------------------------------------------------------


def peft_names(chosen: dict) -> dict[str, tuple]:
    """{what peft calls the module of a matrix: (module's name, module, matrix)}, for (name, module, matrix) of each."""
    places = {}
    for name, module, matrix in chosen.values():
        wrapped = [n for n, _ in module.named_parameters(recurse=False) if (name, module, n) in chosen.values()]
        inside = len(wrapped) - 1 - wrapped.index(matrix) if matrix != "weight" else 0
        places[PREFIX + name + ".base_layer" * inside] = name, module, matrix
    return places


def to_peft(A, B):
    """Factors as peft keeps them."""
    return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def from_peft(A, B, rank):
    """The inverse for experts: [r*E,in], [out,r*E] -> [E,r,in], [E,out,r]."""
    return A.unflatten(0, (-1, rank)), B.unflatten(1, (rank, -1)).permute(2, 0, 1)


def save_lora(model: nn.Module, folder) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, which peft's PeftModel.from_pretrained and load_lora
    read. On ranks, sharded by FSDP2 or not: all call it, the first writes. Errors: ValueError for a model without LoRA
    or with several ranks or scales; FileExistsError."""
    known = lora.candidates(model, kind)
    chosen = {full: place for full, place in known.items() if has_lora(place[1]) and factors(place[1], place[2])}
    if not chosen:
        raise ValueError("save_lora: the model has no LoRA. Hint: add_lora(model)")
    tensors, kinds = {}, set()
    for there, (_, module, matrix) in peft_names(chosen).items():
        A, B = factors(module, matrix)
        kinds.add((A.shape[-2], module.lora_scale, module.lora_dropout))
        A, B = (p.full_tensor() if hasattr(p, "placements") else p for p in (A.detach(), B.detach()))
        for suffix, factor in zip("AB", to_peft(A, B), strict=True):
            tensors[f"{there}.lora_{suffix}.weight"] = factor.cpu().contiguous()
    if len(kinds) > 1:
        raise ValueError(f"save_lora: the model has LoRA of {len(kinds)} kinds (rank, scale, dropout), "
                         f"{sorted(kinds)}, and a file is for one")
    if dist.is_initialized() and dist.get_rank():
        return
    (rank, scale, dropout), folder = *kinds, Path(folder)
    folder.mkdir(parents=True)
    modules, parameters = ([full for full, place in chosen.items() if (place[2] == "weight") == linear]
                           for linear in (True, False))
    config = dict(peft_type="LORA", r=rank, lora_alpha=scale * rank, lora_dropout=dropout, bias="none",
                  target_modules=modules, target_parameters=parameters or None, inference_mode=True, task_type=None,
                  base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None) or None)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def factors(module, matrix):
    """A and B of a matrix, or None."""
    pair = module.pairs_of(module)[matrix]
    return (getattr(module, f"{pair}_A"), getattr(module, f"{pair}_B")) if hasattr(module, f"{pair}_A") else None


# What peft can say about an adapter that is not W + (alpha/r) B A everywhere with one rank and alpha.
FOREIGN = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
           "fan_in_fan_out", "alora_invocation_tokens", "trainable_token_indices", "rank_pattern", "alpha_pattern",
           "arrow_config", "kasa_config", "velora_config", "monteclora_config")


def load_lora(model: nn.Module, folder) -> list[str]:
    """add_lora with what a folder of save_lora or of peft says and holds -> the factors' names. Every tensor of it is
    used, or nothing is done. Errors: FileNotFoundError, ValueError."""
    if any(map(has_lora, model.modules())):
        raise ValueError("load_lora: the model has LoRA already. Hint: merge_lora(model) first, or a fresh model")
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"load_lora: {folder} is damaged: {error}") from None
    foreign = [key for key in FOREIGN if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or foreign:
        raise ValueError(f"load_lora: {folder} has peft_type {config.get('peft_type')}, bias {config.get('bias')} and "
                         f"{', '.join(foreign) or 'no more'}, wanted plain LORA without them")
    rank, alpha = config["r"], config["lora_alpha"]
    known, wanted = lora.candidates(model, kind), config.get("target_parameters") or []
    chosen = {full: place for full, place in known.items()
              if (f"{PREFIX}{full}.lora_A.weight" in tensors if place[2] == "weight" else
                  any(f".{full}".endswith(f".{target}") for target in wanted))}
    places = peft_names(chosen)
    keys = {f"{there}.lora_{suffix}.weight" for there in places for suffix in "AB"}
    if keys != tensors.keys() or not keys:
        raise ValueError(f"load_lora: {folder} and the model do not fit: it lacks {sorted(keys - tensors.keys())[:3]}, "
                         f"and {sorted(tensors.keys() - keys)[:3]} have no place here")
    values = {}
    for there, (name, module, matrix) in places.items():
        A, B = (tensors[f"{there}.lora_{suffix}.weight"] for suffix in "AB")
        A, B = (A, B) if matrix == "weight" else from_peft(A, B, rank)
        shapes = kind(module).factor_shapes(module, matrix, rank)
        if (A.shape, B.shape) != shapes:
            raise ValueError(f"load_lora: {there} in {folder} has factors {list(A.shape)} and {list(B.shape)}, wanted "
                             f"{list(shapes[0])} and {list(shapes[1])}")
        values[name, matrix] = A, B
    scale = rank ** 0.5 if config.get("use_rslora") else 1
    made = add_lora(model, rank, alpha * scale, "|".join(f"^{re.escape(full)}$" for full in chosen),
                    config.get("lora_dropout", 0.0))
    with torch.no_grad():
        for name, module, matrix in places.values():
            for factor, value in zip(factors(module, matrix), values[name, matrix], strict=True):
                factor.copy_(value)
    return made
