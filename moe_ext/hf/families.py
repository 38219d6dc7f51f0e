"""The architectures that the GPT and transformers share: what their configs say, and where their tensors lie.

    family = of(config)                     # transformers' config -> Family; ConfigError names what is not known
    model = family.read(config)             # -> ModelConfig: each field is used, without effect, or refused by its name
    config = family.write(model)            # -> transformers' config, whose read() is the same function as `model`
    family.parts(model, "experts")          # {parameter of the GPT: [Part, ..]}, which are together all of each

A Part is one tensor of theirs and the view of one of our parameters that it is, so one table serves both ways:

    view = part.of(ours);   view.copy_(theirs.view(view.shape))         theirs = part.of(ours).reshape(part.shape)

E experts, D model width, F expert width. Experts lie on disk one by one ("experts": gate, up [F,D] and down [D,F] of
each) or fused ("fused": gate_up_proj [E,2F,D], down_proj [E,D,F]); gpt-oss has them fused, with in before out and gate
and up of a unit beside each other.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_ext.checkpoint import TRAINING_ONLY, named_tensors
from moe_ext.config import ConfigError, ModelConfig, build, did_you_mean, require
from moe_ext.layers.fused import norm_power
from moe_ext.model import GPT


# ---- rules: some fields of their config and what they say of ours ----------------------------------------------------
class Rule(NamedTuple):
    """theirs: the fields that it speaks of. read: their config as a dict -> {our field: value}; ConfigError if the GPT
    does not have it. write: our config -> {their field: value}."""
    theirs: tuple[str, ...]
    read: Callable[[dict], dict]
    write: Callable[[ModelConfig], dict]


def same(theirs: str, ours: str, kind=lambda x: x) -> Rule:
    """One field of the same meaning; None: it is not said."""
    *section, name = ours.split(".")
    return Rule((theirs,), lambda c: {} if c.get(theirs) is None else {ours: kind(c[theirs])},
                lambda m: {theirs: getattr(m.moe if section else m, name)})


def only(theirs: str, value) -> Rule:
    """A field for which the GPT has one value."""
    def read(c):
        got = c.get(theirs, value)
        require(got == value, f"{theirs} is {got!r}, the GPT has only {value!r}")
        return {}
    return Rule((theirs,), read, lambda m: {theirs: value})


def free(*theirs: str) -> Rule:
    """Fields that change no logits."""
    return Rule(theirs, lambda c: {}, lambda m: {})


def always(**ours) -> Rule:
    """What the architecture is without saying so; of "moe", fields of moe."""
    moe = {f"moe.{name}": value for name, value in ours.pop("moe", {}).items()}
    return Rule((), lambda c: ours | moe, lambda m: {})


def read_bias(theirs: str, kind: str) -> Rule:
    """A switch of biases, which then stand on `kind` of attention's matrices."""
    return Rule((theirs,), lambda c: {"attention_bias": kind if c[theirs] else "none"},
                lambda m: {theirs: m.attention_biases[0]})


# rope_type -> {rope_stretch: {parameter: (value, what it is if not said)}}
YARN = {"beta_fast": (32.0, 32.0), "beta_slow": (1.0, 1.0)}
STRETCHES = {
    "yarn": {"yarn_rounded": {"truncate": (True, True), **YARN}, "yarn": {"truncate": (False, True), **YARN}},
    "llama3": {"llama3": {"low_freq_factor": (1.0, None), "high_freq_factor": (4.0, None)}},
    "linear": {"linear": {}},
}


def read_rope(c: dict) -> dict:
    rope = {name: value for name, value in c["rope_parameters"].items() if value is not None}
    kind, base = rope.pop("rope_type", "default"), float(rope.pop("rope_theta"))
    ours = {"rope_base": base, "rope_fraction": float(rope.pop("partial_rotary_factor", 1.0))}
    if rope.get("type") == kind:        # its name in older configs
        del rope["type"]
    if kind != "default":
        require(kind in STRETCHES, f"rope_type is {kind}, the GPT has default, {', '.join(STRETCHES)}")
        context = rope.pop("original_max_position_embeddings", c["max_position_embeddings"])
        scale = float(rope.pop("factor", 0) or c["max_position_embeddings"] / context)
        ours |= {"rope_scale": scale, "rope_context": 0 if kind == "linear" else context}
        if kind == "yarn" and math.isclose(rope.get("attention_factor", 0), 0.1 * math.log(scale) + 1):
            rope.pop("attention_factor")
        stretches = STRETCHES[kind]
        fitting = [name for name, wanted in stretches.items()
                   if all(rope.get(field, default) == value for field, (value, default) in wanted.items())]
        require(bool(fitting), f"rope_parameters are {c['rope_parameters']}, the GPT's {kind} has " + " or ".join(
            ", ".join(f"{field} {value}" for field, (value, _) in wanted.items()) for wanted in stretches.values()))
        ours["rope_stretch"] = fitting[0]
        rope = {field: value for field, value in rope.items() if field not in stretches[fitting[0]]}
    rest = ", ".join(f"{field} {value}" for field, value in rope.items())
    require(not rest, f"rope_parameters has {rest}, which the GPT's RoPE of type {kind} does not have")
    return ours


def write_rope(m: ModelConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": m.rope_base, "partial_rotary_factor": m.rope_fraction}
    if m.rope_scale != 1:
        kind = next(kind for kind, stretches in STRETCHES.items() if m.rope_stretch in stretches)
        rope |= {"rope_type": kind, "factor": m.rope_scale}
        rope |= {field: value for field, (value, _) in STRETCHES[kind][m.rope_stretch].items()}
        if kind != "linear":
            rope["original_max_position_embeddings"] = m.rope_context
    return {"rope_parameters": rope}


def read_windows(c: dict) -> dict:
    layers, window = c["num_hidden_layers"], c.get("sliding_window") or 0
    types = c.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    if set(types) == {"full_attention"}:
        return {}
    require(window > 0, f"layer_types is {types}, but sliding_window {c.get('sliding_window')}")
    for every in (0, *range(2, layers + 1)):
        if types == ["full_attention" if every and (i + 1) % every == 0 else "sliding_attention"
                     for i in range(layers)]:
            return {"window": window, "window_full_every": every}
    raise ConfigError(f"layer_types is {types}: the GPT's blocks have a window in all, or in all but each n-th")


def layer_types(m: ModelConfig) -> list[str]:
    return ["sliding_attention" if m.window_of(i) else "full_attention" for i in range(m.layers)]


def read_dense(c: dict) -> dict:
    dense, step = sorted(c["mlp_only_layers"] or []), c["decoder_sparse_step"]
    require(step == 1, f"decoder_sparse_step is {step}, the GPT has only 1")
    require(dense == list(range(len(dense))), f"mlp_only_layers is {dense}: of the GPT the first blocks may be dense")
    return {"moe.dense_layers": len(dense)}


def read_shared(c: dict) -> dict:
    return {"moe.shared_hidden": c["n_shared_experts"] * c["moe_intermediate_size"]}


def write_shared(m: ModelConfig) -> dict:
    return {"n_shared_experts": m.moe.shared_hidden // m.moe.hidden}


COMMON = (
    same("vocab_size", "vocab_size"), same("max_position_embeddings", "seq_len"), same("num_hidden_layers", "layers"),
    same("hidden_size", "dim"), same("rms_norm_eps", "norm_eps", float), same("initializer_range", "init_std", float),
    same("tie_word_embeddings", "tied"),
    Rule(("num_attention_heads", "num_key_value_heads", "head_dim"),
         lambda c: {"heads": c["num_attention_heads"], "kv_heads": c["num_key_value_heads"] or 0,
                    "head_dim": c.get("head_dim") or 0},
         lambda m: {"num_attention_heads": m.heads, "num_key_value_heads": m.kv_groups, "head_dim": m.head_width}),
    Rule(("rope_parameters",), read_rope, write_rope),
    only("hidden_act", "silu"), only("attention_dropout", 0.0),
    free("model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "return_dict", "use_cache",
         "tokenizer_class", "torchscript", "unsloth_version", "unsloth_fixed",
         "problem_type", "id2label", "label2id", "is_encoder_decoder", "chunk_size_feed_forward", "output_attentions",
         "output_hidden_states", "pad_token_id", "bos_token_id", "eos_token_id"),
)
MOE = (*COMMON, same("num_experts_per_tok", "moe.top_k"), free("output_router_logits"))
BALANCE = same("router_aux_loss_coef", "moe.balance_weight", float)
NORM = Rule(("norm_topk_prob",), lambda c: {"moe.norm_p": float(c["norm_topk_prob"])},
            lambda m: {"norm_topk_prob": norm_power(m.moe.norm_p, m.moe.top_k) == 1})
DENSE = Rule(("decoder_sparse_step", "mlp_only_layers"), read_dense,
             lambda m: {"decoder_sparse_step": 1, "mlp_only_layers": list(range(m.moe.dense_layers))})
WINDOW = Rule(("sliding_window",), read_windows, lambda m: {"sliding_window": m.window or None})
# use_sliding_window and max_window_layers have decided the others
WINDOWS = Rule(("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"), read_windows,
               lambda m: {"sliding_window": m.window or None, "use_sliding_window": m.window > 0,
                          "layer_types": layer_types(m)})


# ---- tensors ---------------------------------------------------------------------------------------------------------
class Part(NamedTuple):
    """A tensor of theirs: its name and shape, and of our parameter the view that has its values in its order."""
    name: str
    shape: tuple[int, ...]
    of: Callable[[torch.Tensor], torch.Tensor]


def whole(x):
    return x


def one_by_one(gate: str, up: str, down: str):
    """Parts of w13_E2FD or w2_EDF, each expert's matrices under these names."""
    def parts(experts, name, x):
        if name == "w13_E2FD":
            return [Part(f"{experts}.{e}.{which}.weight", tuple(x.shape[2:]), lambda y, e=e, half=half: y[e, half])
                    for e in range(x.shape[0]) for half, which in enumerate((gate, up))]
        return [Part(f"{experts}.{e}.{down}.weight", tuple(x.shape[1:]), lambda y, e=e: y[e])
                for e in range(x.shape[0])]
    return parts


def fused(experts, name, x):
    if name == "w13_E2FD":
        E, _, F, D = x.shape
        return [Part(f"{experts}.gate_up_proj", (E, 2 * F, D), whole)]
    return [Part(f"{experts}.down_proj", tuple(x.shape), whole)]


def fused_in_turns(experts, name, x):
    if name == "w13_E2FD":
        E, _, F, D = x.shape
        return [Part(f"{experts}.gate_up_proj", (E, D, 2 * F), lambda y: y.permute(0, 3, 2, 1))]
    if name == "w13_bias":
        E, _, F = x.shape
        return [Part(f"{experts}.gate_up_proj_bias", (E, 2 * F), lambda y: y.transpose(1, 2))]
    if name == "w2_EDF":
        E, D, F = x.shape
        return [Part(f"{experts}.down_proj", (E, F, D), lambda y: y.transpose(1, 2))]
    return [Part(f"{experts}.down_proj_bias", tuple(x.shape), whole)]


class Layout(NamedTuple):
    """How experts lie on disk. parts: (their name of "experts", ours of the parameter, the parameter) -> Parts. names:
    ours -> theirs of whatever else is named otherwise in such files."""
    parts: Callable
    names: dict[str, str] = {}      # noqa: RUF012 (nobody writes to it)


# ---- families --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Family:
    """An architecture: the rules of its config, and the layouts of its experts on disk, the usual one first."""
    model_type: str
    rules: tuple[Rule, ...]
    layouts: dict[str, Layout]

    def read(self, config) -> ModelConfig:
        """transformers' config -> ModelConfig. ConfigError names each option that the GPT does not have."""
        c, ours, wrong = config.to_dict(), {"moe": {}}, []
        for rule in self.rules:
            try:
                for path, value in rule.read(c).items():
                    section, _, name = path.rpartition(".")
                    (ours[section] if section else ours)[name] = value
            except ConfigError as error:
                wrong.append(str(error))
        known = {name for rule in self.rules for name in rule.theirs}
        wrong += [f"{name} is {value!r}, which the GPT does not have" for name, value in c.items()
                  if name not in known and value is not None]
        require(not wrong, f"{self.model_type}: " + "; ".join(wrong))
        try:
            return build(ModelConfig, ours, "model.")
        except ConfigError as error:
            raise ConfigError(f"{self.model_type}: {error}") from None

    def write(self, model: ModelConfig):
        """ModelConfig -> transformers' config. ConfigError names what this architecture cannot say."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig
        c = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        for rule in self.rules:
            c |= rule.write(model)
        try:
            config = AutoConfig.for_model(self.model_type, **c)
            lost = [f"{name} {mine!r} (it would be {there!r})" for name, mine, there
                    in differences(model, self.read(config))]
        except (ConfigError, StrictDataclassError) as error:       # the second is theirs, which validates
            lost = [" ".join(str(error).split())]
        require(not lost, f"{self.model_type} does not have " + "; ".join(lost))
        return config

    def parts(self, model: ModelConfig, layout: str = "") -> dict[str, list[Part]]:
        """The Parts of each parameter and persistent buffer of the GPT, in its order. layout: "" is the usual one.
        ConfigError if the architecture has no such layout."""
        layout = layout or next(iter(self.layouts))
        require(layout in self.layouts, f"{self.model_type} has its experts in the layout "
                f"{' or '.join(self.layouts)}, not {layout}{did_you_mean(layout, self.layouts)}")
        names = self.layouts[layout].names

        def theirs(name):
            for ours, there in names.items():
                name = name.replace(ours, there)
            return name if name.startswith("lm_head.") else "model." + name

        def parts(name, x):
            before, experts, last = name.partition(".experts.")
            if experts:
                return self.layouts[layout].parts(theirs(before + ".experts"), last, x)
            return [Part(theirs(name), tuple(x.shape), whole)]
        return {name: parts(name, x) for name, x in named_tensors(GPT(model, device="meta")).items()}


def effective(model: ModelConfig) -> dict:
    """What decides the function: defaults resolved, fields of no effect and of training alone left out."""
    m, flat = model.moe, {f"model.{name}": value for name, value in vars(model).items() if name not in ("moe", "tune")}
    flat |= {"model.tune.lora_rank": model.tune.lora_rank, "model.kv_heads": model.kv_groups,
             "model.head_dim": model.head_width, "model.attention_bias": model.attention_biases}
    if model.rope_scale == 1:
        flat |= {"model.rope_stretch": None, "model.rope_context": None}
    if m.experts:
        flat |= {f"model.moe.{name}": value for name, value in dataclasses.asdict(m).items()}
        rule = m.score, norm_power(m.norm_p, m.top_k)
        if rule in (("topk_softmax", 0), ("topk_softmax", 1)):      # the softmax over all, normed over the chosen
            rule = "softmax_topk", 1.0
        flat |= {"model.moe.select_bias_rate": m.select_bias_rate > 0}
        flat["model.moe.score"], flat["model.moe.norm_p"] = rule
        if not m.dense_layers:
            flat["model.hidden"] = None
    return {name: value for name, value in flat.items() if name not in TRAINING_ONLY}


def differences(model: ModelConfig, other: ModelConfig) -> list[tuple[str, object, object]]:
    """(field, value, the other's) wherever two configs are different functions."""
    mine, there = effective(model), effective(other)
    return [(name, mine.get(name), there.get(name)) for name in mine | there if mine.get(name) != there.get(name)]


def layouts(*names: tuple[str, str]) -> dict[str, Layout]:
    """Both, with experts in the usual names; names: (ours, theirs) of whatever else is named otherwise."""
    return {"experts": Layout(one_by_one("gate_proj", "up_proj", "down_proj"), dict(names)),
            "fused": Layout(fused, dict(names))}


DENSE_ONLY = {"experts": layouts()["experts"]}      # there are none, in whatever layout

FAMILIES = {family.model_type: family for family in (
    Family("qwen3_moe", (
        *MOE, BALANCE, NORM, DENSE, read_bias("attention_bias", "all"), same("intermediate_size", "hidden"),
        same("num_local_experts", "moe.experts"), same("moe_intermediate_size", "moe.hidden"), WINDOW,
        Rule(("use_sliding_window", "max_window_layers"), lambda c: {}, lambda m: {"use_sliding_window": m.window > 0}),
        always(qk_norm=True)), layouts()),
    Family("qwen2_moe", (
        *MOE, BALANCE, NORM, DENSE, read_bias("qkv_bias", "qkv"), same("intermediate_size", "hidden"),
        same("num_experts", "moe.experts"), same("moe_intermediate_size", "moe.hidden"), WINDOWS,
        same("shared_expert_intermediate_size", "moe.shared_hidden"), always(moe={"shared_gate": True})),
        layouts((".shared.", ".shared_expert."), (".shared_gate.", ".shared_expert_gate."))),
    Family("olmoe", (
        *MOE, BALANCE, NORM, read_bias("attention_bias", "all"), same("num_experts", "moe.experts"),
        same("intermediate_size", "moe.hidden"), only("clip_qkv", None), always(qk_norm=True, qk_norm_over="width")),
        layouts()),
    Family("mixtral", (
        *MOE, BALANCE, WINDOW, same("num_local_experts", "moe.experts"), same("intermediate_size", "moe.hidden"),
        only("router_jitter_noise", 0.0), always(attention_bias="none", moe={"score": "topk_softmax", "norm_p": 0.0})),
        {"experts": Layout(one_by_one("w1", "w3", "w2"), {".mlp.": ".block_sparse_moe."}), "fused": Layout(fused)}),
    Family("glm4_moe", (
        *MOE, NORM, read_bias("attention_bias", "qkv"), same("intermediate_size", "hidden"),
        same("n_routed_experts", "moe.experts"), same("moe_intermediate_size", "moe.hidden"),
        Rule(("n_shared_experts",), read_shared, write_shared), same("routed_scaling_factor", "moe.scale", float),
        same("n_group", "moe.groups"), same("topk_group", "moe.top_groups"),
        same("first_k_dense_replace", "moe.dense_layers"), same("use_qk_norm", "qk_norm"),
        free("num_nextn_predict_layers"), always(moe={"score": "sigmoid", "select_bias_rate": 0.001})),
        layouts((".shared.", ".shared_experts."), (".select_bias_E", ".gate.e_score_correction_bias"))),
    Family("gpt_oss", (
        *MOE, BALANCE, WINDOWS, read_bias("attention_bias", "all"), same("num_local_experts", "moe.experts"),
        same("intermediate_size", "moe.hidden"), only("swiglu_alpha", 1.702), only("swiglu_limit", 7.0),
        free("initial_context_length", "experts_per_token"),
        always(act="swiglu_oai", bias=True, sinks=True, moe={"score": "topk_softmax", "norm_p": 0.0,
                                                             "router_bias": True})),
        {"fused": Layout(fused_in_turns, {".gate.": ".router."})}),
    Family("llama", (
        *COMMON, same("intermediate_size", "hidden"), read_bias("attention_bias", "all"), same("mlp_bias", "bias"),
        free("pretraining_tp")), DENSE_ONLY),
    Family("qwen3", (
        *COMMON, same("intermediate_size", "hidden"), read_bias("attention_bias", "all"), WINDOWS,
        always(qk_norm=True)), DENSE_ONLY),
)}


def of(config) -> Family:
    """The Family of transformers' config. ConfigError for another architecture."""
    require(config.model_type in FAMILIES, f"model_type is {config.model_type}, wanted one of {', '.join(FAMILIES)}"
            f"{did_you_mean(config.model_type, FAMILIES)}")
    return FAMILIES[config.model_type]


def able(model: ModelConfig) -> list[str]:
    """The architectures that have all of a ModelConfig."""
    def can(family):
        try:
            family.write(model)
        except ConfigError:
            return False
        return True
    return [name for name, family in FAMILIES.items() if can(family)]
