"""The architectures that the GPT and transformers share: what their configs say, and where their tensors lie.

    family = of(config)                     # transformers' config -> Family; ConfigError names what is not known
    model = family.read(config)             # -> ModelConfig; every field is used, of no effect, or refused by its name
    config = family.write(model)            # -> transformers' config, whose read() is `model` again
    family.parts(model, "experts")          # {parameter of the GPT: [Part, ..]}: together all of each, each once

A Part is one tensor of theirs and the view of one of our parameters that it is, so one table serves both ways:

    part.of(ours).copy_(theirs.view_as(part.of(ours)));    theirs = part.of(ours).reshape(part.shape)

E experts, D model width, F expert width. Experts lie on disk one by one ("experts": gate_proj, up_proj [F,D], down_proj
[D,F] of each) or fused ("fused": gate_up_proj [E,2F,D], down_proj [E,D,F]); gpt-oss only fused, with in and out
exchanged and gate and up in turns.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moe_ext.checkpoint import TRAINING_ONLY, named_tensors
from moe_ext.config import ConfigError, ModelConfig, MoEConfig, build, did_you_mean, require
from moe_ext.layers.fused import norm_power
from moe_ext.model import GPT

LAYOUTS = "experts", "fused"


class Part(NamedTuple):
    """A tensor of theirs: its name and shape, and of our parameter the view that has its values in its order."""
    name: str
    shape: tuple[int, ...]
    of: Callable[[torch.Tensor], torch.Tensor]


def whole(x):
    return x


# ---- configs ---------------------------------------------------------------------------------------------------------
# Fields of the same meaning: theirs -> ours.
FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "seq_len", "num_hidden_layers": "layers",
    "hidden_size": "dim", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim",
    "intermediate_size": "hidden", "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied",
    "initializer_range": "init_std",
}
EXPERTS = {"num_experts_per_tok": "moe.top_k", "router_aux_loss_coef": "moe.balance_weight"}
# Fields of one value: it is what the GPT computes. The first ones are dropped in no architecture here.
FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "is_encoder_decoder": False, "chunk_size_feed_forward": 0}
# Fields without effect on the logits.
FREE = {
    "model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "return_dict", "problem_type",
    "id2label", "label2id", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "bos_token_id", "eos_token_id",
}


def get(model: ModelConfig, path: str):
    for name in path.split("."):
        model = getattr(model, name)
    return model


def put(table: dict, path: str, value) -> None:
    *sections, name = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[name] = value


def read_rope(c: dict) -> dict:
    """rope_parameters -> our fields. ConfigError for a kind that the GPT has not."""
    rope = dict(c["rope_parameters"])
    kind = rope.pop("rope_type", "default")
    ours = {"rope_base": float(rope.pop("rope_theta")), "rope_fraction": float(rope.pop("partial_rotary_factor", 1.0))}
    if kind == "yarn":
        ours |= {"rope_scale": float(rope.pop("factor")), "rope_context": rope.pop("original_max_position_embeddings")}
        for name, only, otherwise in (("beta_fast", 32.0, 32.0), ("beta_slow", 1.0, 1.0), ("truncate", False, True)):
            got = rope.pop(name, otherwise)
            require(got == only, f"rope_parameters.{name} is {got}: the GPT's YaRN has {only}")
    else:
        require(kind == "default", f"rope_parameters.rope_type is {kind}: the GPT has default and yarn")
    require(not rope, f"rope_parameters has {', '.join(f'{k} {v}' for k, v in rope.items())}, which the GPT's RoPE of "
            f"type {kind} has not")
    return ours


def write_rope(m: ModelConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": m.rope_base}
    if m.rope_fraction != 1:
        rope["partial_rotary_factor"] = m.rope_fraction
    if m.rope_scale != 1:
        rope |= {"rope_type": "yarn", "factor": m.rope_scale, "original_max_position_embeddings": m.rope_context,
                 "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return {"rope_parameters": rope}


def read_windows(c: dict) -> dict:
    """sliding_window and layer_types -> our window and which blocks see everything."""
    layers, window = c["num_hidden_layers"], c.get("sliding_window") or 0
    types = c.get("layer_types") or [("sliding_attention" if window else "full_attention")] * layers
    full = [kind == "full_attention" for kind in types]
    if all(full):
        return {}
    for every in [0, *range(2, layers + 1)]:
        if full == [every > 0 and (i + 1) % every == 0 for i in range(layers)]:
            return {"window": window, "window_full_every": every}
    raise ConfigError(f"layer_types is {types}: the GPT's blocks see everything at every n-th place "
                      "(window_full_every) or nowhere")


def write_windows(m: ModelConfig) -> list[str]:
    return ["sliding_attention" if m.window_of(i) else "full_attention" for i in range(m.layers)]


# ---- tensors ---------------------------------------------------------------------------------------------------------
def one_by_one(gate, up, down):
    """Experts as tensors of their own -> Parts of w13 and w2 of a layer whose experts are at `prefix`."""
    def parts(prefix, name, x):
        def pick(*at):
            return lambda y: y[at]
        E, D, F = x.shape[0], x.shape[-1], x.shape[-2]
        if name == "w13_E2FD":
            return [Part(f"{prefix}.{e}.{which}.weight", (F, D), pick(e, half))
                    for e in range(E) for half, which in enumerate((gate, up))]
        return [Part(f"{prefix}.{e}.{down}.weight", tuple(x.shape[1:]), pick(e)) for e in range(E)]
    return parts


def fused(prefix, name, x):
    if name == "w13_E2FD":
        E, _, F, D = x.shape
        return [Part(f"{prefix}.gate_up_proj", (E, 2 * F, D), whole)]
    return [Part(f"{prefix}.down_proj", tuple(x.shape), whole)]


def fused_in_turns(prefix, name, x):
    """gpt-oss: in before out, gate and up of a unit beside each other, biases."""
    E, D, F = x.shape[0], x.shape[-1], x.shape[-2]
    if name == "w13_E2FD":
        return [Part(f"{prefix}.gate_up_proj", (E, D, 2 * F), lambda y: y.permute(0, 3, 2, 1))]
    if name == "w13_bias":
        return [Part(f"{prefix}.gate_up_proj_bias", (E, 2 * x.shape[2]), lambda y: y.transpose(1, 2))]
    if name == "w2_EDF":
        return [Part(f"{prefix}.down_proj", (E, x.shape[2], x.shape[1]), lambda y: y.transpose(1, 2))]
    return [Part(f"{prefix}.down_proj_bias", tuple(x.shape), whole)]


# ---- families --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """An architecture. fields, fixed and free say what of its config is ours, has one value and has no effect; `more`
    gives our other fields from it, `less` its other fields from ours. names: of a tensor, ours -> theirs where they
    differ beyond "model."; layouts: how its experts can lie on disk, the usual one first."""
    model_type: str
    fields: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, object] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    more: Callable[[dict], dict] = lambda c: {}
    less: Callable[[ModelConfig], dict] = lambda m: {}
    names: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, Callable] = field(default_factory=dict)

    def read(self, config) -> ModelConfig:
        """transformers' config -> ModelConfig. ConfigError names each option that the GPT does not have."""
        c, ours, wrong = config.to_dict(), {}, []
        for theirs, path in (FIELDS | self.fields).items():
            if c.get(theirs) is not None:       # what is not given is our default, or `more` says it
                value = c[theirs]
                put(ours, path, float(value) if path in ("norm_eps", "init_std", "moe.balance_weight") else value)
        for theirs, only in (FIXED | self.fixed).items():
            if theirs in c and c[theirs] != only:
                wrong.append(f"{theirs} is {c[theirs]!r}, the GPT has only {only!r}")
        known = {*FIELDS, *self.fields, *FIXED, *self.fixed, *FREE, *self.free}
        wrong += [f"{theirs} is {c[theirs]!r}, which the GPT does not know" for theirs in c if theirs not in known
                  and c[theirs] is not None]
        require(not wrong, f"{self.model_type}: " + "; ".join(wrong))
        try:
            for path, value in self.more(c).items():
                put(ours, path, value)
            return build(ModelConfig, ours, "model.")
        except ConfigError as error:
            raise ConfigError(f"{self.model_type}: {error}") from None

    def write(self, model: ModelConfig):
        """ModelConfig -> transformers' config. ConfigError names the fields that this architecture does not have."""
        from transformers import AutoConfig
        c = {theirs: get(model, path) for theirs, path in (FIELDS | self.fields).items()} | self.fixed
        c |= {"num_key_value_heads": model.kv_groups, "head_dim": model.head_width} | self.less(model)
        config = AutoConfig.for_model(self.model_type, **{"pad_token_id": None, "bos_token_id": None,
                                                          "eos_token_id": None} | c)
        differing = self.differing(model, config)
        require(not differing, f"{self.model_type} cannot say " + "; ".join(differing))
        return config

    def differing(self, model: ModelConfig, config) -> list[str]:
        """The fields, beyond those of training alone, in which the config is another model than ours."""
        try:
            back = self.read(config)
        except ConfigError as error:
            return [str(error)]
        return [f"model.{name} {mine}" for name, mine, there in changes(model, back)]

    def parts(self, model: ModelConfig, layout: str = "") -> dict[str, list[Part]]:
        """The Parts of each parameter and persistent buffer of the GPT, in its order. layout: of LAYOUTS; "": the usual
        one. ConfigError if the architecture has no such layout."""
        layout = layout or next(iter(self.layouts), "")
        require(not self.layouts or layout in self.layouts, f"{self.model_type} has its experts in the layout "
                f"{' or '.join(self.layouts)}, not {layout!r}{did_you_mean(layout, self.layouts)}")
        return {name: self.parts_of(name, x, layout)
                for name, x in named_tensors(GPT(model, device="meta")).items()}

    def parts_of(self, name, x, layout):
        prefix, _, last = name.rpartition(".experts.")
        if prefix and ".mlp" in prefix:
            return self.layouts[layout](self.theirs(f"{prefix}.experts"), last, x)
        return [Part(self.theirs(name), tuple(x.shape), whole)]

    def theirs(self, name: str) -> str:
        for ours, there in self.names.items():
            name = name.replace(ours, there)
        return name if name.startswith("lm_head.") else "model." + name


def effective(model: ModelConfig) -> dict:
    """What decides the function: defaults resolved, fields of training alone left out."""
    flat = {f"model.{name}": value for name, value in dataclasses.asdict(model).items() if name != "moe"}
    flat |= {"model.kv_heads": model.kv_groups, "model.head_dim": model.head_width,
             "model.attention_bias": model.attention_biases, "model.rope_context": model.rope_scale > 1 and
             model.rope_context}
    m = model.moe
    if m.experts:
        flat |= {f"model.moe.{name}": value for name, value in dataclasses.asdict(m).items()}
        flat |= {"model.moe.norm_p": norm_power(m.norm_p, m.top_k), "model.moe.select_bias_rate":
                 m.select_bias_rate > 0}
        if not m.dense_layers:
            flat.pop("model.hidden")
    return {name: value for name, value in flat.items() if name not in TRAINING_ONLY}


def changes(model: ModelConfig, other: ModelConfig) -> list[tuple[str, object, object]]:
    """(name, value, the other's) of each field in which two configs are different functions."""
    mine, there = effective(model), effective(other)
    absent = effective(ModelConfig(moe=MoEConfig(experts=1, top_k=1)))
    return [(name, mine.get(name, absent.get(name)), there.get(name, absent.get(name)))
            for name in mine | there if mine.get(name) != there.get(name)]


def moe(**more):
    """The fields of a MoE without shared experts, groups or biases, whose weights are normed if norm_topk_prob."""
    def read(c):
        return {"moe.norm_p": float(c["norm_topk_prob"]), **read_rope(c), **more}

    def write(m):
        return {"norm_topk_prob": norm_power(m.moe.norm_p, m.moe.top_k) == 1, **write_rope(m)}
    return {"more": read, "less": write}


QWEN_LAYOUTS = {"experts": one_by_one("gate_proj", "up_proj", "down_proj"), "fused": fused}

FAMILIES = {family.model_type: family for family in (
    Family(
        "qwen3_moe", EXPERTS | {"num_local_experts": "moe.experts", "moe_intermediate_size": "moe.hidden"},
        {"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "decoder_sparse_step": 1,
         "mlp_only_layers": []},
        frozenset({"rope_parameters", "norm_topk_prob"}), **moe(qk_norm=True), layouts=QWEN_LAYOUTS),
)}


def of(config) -> Family:
    """The Family of transformers' config. ConfigError for another architecture."""
    require(config.model_type in FAMILIES, f"model_type is {config.model_type!r}, wanted one of {', '.join(FAMILIES)}"
            f"{did_you_mean(config.model_type, FAMILIES)}")
    return FAMILIES[config.model_type]


def able(model: ModelConfig) -> list[str]:
    """The architectures that can say what a ModelConfig says."""
    def can(family):
        try:
            family.write(model)
        except ConfigError:
            return False
        return True
    return [name for name, family in FAMILIES.items() if can(family)]
