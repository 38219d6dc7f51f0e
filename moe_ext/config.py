"""One tree of dataclasses describes a whole run: recipe (TOML) -> Config <- typed command line.

    config = load("recipes/tiny.toml")              # unknown field or wrong type: ConfigError with a sentence
    config = parse(["recipes/tiny.toml", "--train.steps", "100"])
    open("config.toml", "w").write(dumps(config))   # load() of that file gives an equal Config

Order of precedence: command line, `--type` (as_type), recipe, the defaults below. Every field says its unit. Each class
checks its own values in __post_init__ and Config what crosses sections, so an invalid Config cannot be built.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import shlex
import sys
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Act = Literal["swiglu", "geglu", "geglu_tanh", "swiglu_oai", "silu", "gelu", "gelu_tanh", "relu"]
Sharing = Literal["ulysses", "gather"]      # of a sequence: heads for tokens, or all keys and values
Order = Literal["gpipe", "1f1b", "interleaved", "breadth_first", "depth_first", "dfc", "bfc"]


class ConfigError(ValueError):
    """A recipe or a command line that describes no run; the message names the field, what it got and what it wants."""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def did_you_mean(got: str, choices) -> str:
    """The end of a sentence about a wrong word."""
    near = difflib.get_close_matches(got, choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass(frozen=True)
class MoEConfig:
    experts: int = 0                    # experts per MoE layer; 0: every block is dense
    top_k: int = 2                      # experts per token
    hidden: int = 512                   # width F of one expert
    dense_layers: int = 0               # the first blocks that keep a dense MLP
    shared_hidden: int = 0              # width of the shared expert that sees every token; 0: none
    shared_gate: bool = False           # what the shared expert gives is multiplied by sigmoid(x w)
    score: Literal["softmax_topk", "topk_softmax", "sigmoid"] = "softmax_topk"  # logits -> weights
    # the K weights are divided by their p-norm; 0: left as they are; auto: 1, but 0 with top_k 1, where a norm would
    # make the one weight 1
    norm_p: float | Literal["auto"] = "auto"
    scale: float = 1.0                  # the weights are multiplied by this after the norm
    select_bias_rate: float = 0.0       # step of the selection bias per optimizer step; 0: no bias
    groups: int = 1                     # the experts, in order, are so many groups of equal size; 1: no groups
    top_groups: int = 1                 # groups that a token's experts are of: those whose two best scores sum to most
    router_bias: bool = False           # a learned bias on the logits
    noise: bool = False                 # learned noise: logits + scale_E * N(0,1), scale_E starts at 0 (training only)
    jitter: float = 0.0                 # router input times U[1-jitter, 1+jitter) (training only)
    balanced: bool = False              # ignore the logits, spread tokens evenly (throughput tests)
    capacity_factor: float = 0.0        # an expert keeps factor * K * tokens / E copies per scope; 0: dropless
    drop_by: Literal["position", "probability"] = "position"    # which copies go when an expert is full
    scope: Literal["sequence", "micro_batch"] = "sequence"      # tokens over which capacity and balance are taken
    balance_form: Literal["switch", "mse"] = "switch"           # E*sum(f*p), 1 when balanced; or mean((p - 1/E)^2)
    balance_weight: float = 0.01        # weight of the balance loss, averaged over layers; 0: none
    z_weight: float = 0.0               # weight of mean(logsumexp(logits)^2), averaged over layers; 0: none

    def __post_init__(self):
        if self.experts == 0:
            return
        require(self.experts > 0 and self.hidden > 0, "model.moe.experts and model.moe.hidden must be positive")
        require(1 <= self.top_k <= self.experts, f"model.moe.top_k is {self.top_k}, but there are {self.experts} "
                f"experts (model.moe.experts): choose 1 to {self.experts}")
        require(self.norm_p == "auto" or self.norm_p >= 0, f"model.moe.norm_p is {self.norm_p}; it must be auto, 0 (no "
                "norm) or a positive p")
        require(self.top_k > 1 or self.norm_p in ("auto", 0), f"model.moe.norm_p {self.norm_p} makes the one weight of "
                "model.moe.top_k 1 the constant 1, so the router gets no gradient: set it to auto or 0")
        require(self.top_k > 1 or self.score != "topk_softmax", "model.moe.score topk_softmax makes the one weight of "
                "model.moe.top_k 1 the constant 1, so the router gets no gradient: use softmax_topk or sigmoid")
        require(self.scale > 0, f"model.moe.scale is {self.scale}; it must be positive")
        require(0 <= self.jitter < 1, f"model.moe.jitter is {self.jitter}; it must lie in [0, 1)")
        require(self.capacity_factor >= 0, f"model.moe.capacity_factor is {self.capacity_factor}; 0 means dropless, "
                "1.0 the even share")
        require(self.score != "topk_softmax" or self.select_bias_rate == 0, "model.moe.select_bias_rate moves a bias "
                "on scores, but topk_softmax chooses by logits: use sigmoid or softmax_topk, or set it to 0")
        require(not (self.balanced and self.select_bias_rate), "model.moe.balanced ignores the selection bias: set "
                "model.moe.select_bias_rate to 0")
        require(self.shared_hidden > 0 or not self.shared_gate, "model.moe.shared_gate is the gate of a shared expert, "
                "but model.moe.shared_hidden is 0: set both or none")
        groups, size = self.groups, self.experts // max(1, self.groups)
        require(groups >= 1 and self.experts % groups == 0 and (groups == 1 or size > 1), f"model.moe.groups is "
                f"{groups}: {self.experts} experts (model.moe.experts) are 1 group, or several of equal size and at "
                "least 2 experts")
        require(1 <= self.top_groups <= groups and self.top_k <= self.top_groups * size, f"model.moe.top_groups is "
                f"{self.top_groups}: of {groups} groups (model.moe.groups) of {size} experts choose 1 to {groups}, and "
                f"enough for model.moe.top_k {self.top_k}")
        require(groups == 1 or self.score != "topk_softmax", "model.moe.groups are chosen by scores, but topk_softmax "
                "chooses by logits: use sigmoid or softmax_topk, or set it to 1")
        require(groups == 1 or not self.balanced, "model.moe.balanced ignores groups: set model.moe.groups to 1")


@dataclass(frozen=True)
class TuneConfig:
    """What of the model moves: by default all of it. `train`, `freeze` and `lora_targets` are regular expressions
    between commas, searched for in names, as "experts, lm_head"; each must find something (moe_ext.tune.check)."""
    train: str = ""                     # the parameters that move; "": all, or with adapters these alone
    freeze: str = ""                    # parameters that rest, whatever `train` says; "": none
    lora_rank: int = 0                  # rows of A and columns of B in W + alpha / rank * B A; 0: no adapters
    lora_alpha: float = 16.0            # what B A counts, times the rank
    lora_targets: str = ""              # the matrices W with adapters A and B; "": all of attention, MLPs and experts

    def __post_init__(self):
        for name in ("train", "freeze", "lora_targets"):
            for pattern in patterns(getattr(self, name)):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(f"model.tune.{name}: {pattern!r} is no regular expression: {error}") from None
        require(self.lora_rank >= 0, f"model.tune.lora_rank is {self.lora_rank}; it cannot be negative")
        require(0 < self.lora_alpha < math.inf, f"model.tune.lora_alpha is {self.lora_alpha}; it must be positive and "
                "finite")
        require(self.lora_rank > 0 or not self.lora_targets, f"model.tune.lora_targets is {self.lora_targets!r}, but "
                "model.tune.lora_rank is 0: set both or none")

    @property
    def targets(self) -> str:
        """lora_targets in one regular expression."""
        return "|".join(patterns(self.lora_targets)) or "."

    def moves(self, name: str, adapter: bool = False) -> bool:
        """Whether the parameter of this name moves; adapter: whether it is one of an adapter."""
        chosen = finds(self.train, name) if self.train else not self.lora_rank
        return (chosen or adapter) and not finds(self.freeze, name)


def patterns(text: str) -> list[str]:
    """The regular expressions of a field of model.tune."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def finds(text: str, name: str) -> bool:
    """Whether one of them is found in a name."""
    return any(re.search(pattern, name) for pattern in patterns(text))


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 4096              # rows of the embedding; at least the tokenizer's vocabulary
    seq_len: int = 256                  # tokens per training sequence and the longest context
    layers: int = 4                     # blocks
    dim: int = 256                      # model width D
    heads: int = 4                      # query heads
    kv_heads: int = 0                   # key and value heads (GQA); 0: as many as heads
    head_dim: int = 0                   # width of a head; 0: dim / heads
    hidden: int = 1024                  # width of a dense MLP
    act: Act = "swiglu"                 # activation of MLPs and experts
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"   # before attention, before the MLP and before the head
    norm_eps: float = 1e-6              # added to the variance
    bias: bool = False                  # biases in attention, MLPs, experts and LayerNorm
    attention_bias: Literal["auto", "none", "qkv", "all"] = "auto"  # of which of attention's matrices; auto: as `bias`
    window: int = 0                     # tokens that a token sees, itself included (sliding window); 0: all before it
    window_full_every: int = 0          # each so many-th block sees all tokens all the same; 0: none does
    sinks: bool = False                 # a learned logit per head to which softmax may give weight, without a value
    position: Literal["rope", "learned"] = "rope"       # queries and keys turned; or a table of seq_len rows added
    rope_base: float = 10000.0          # wavelengths run from 2 pi to 2 pi * base tokens
    rope_fraction: float = 1.0          # share of a head's columns that RoPE turns
    rope_scale: float = 1.0             # the context is stretched to so many times rope_context; 1: plain RoPE
    rope_context: int = 0               # tokens of the context before it was stretched
    # how: YaRN, the ends of its ramp as they come (gpt-oss) or rounded outwards (its paper); by wavelength, as Llama
    # 3.1; or all positions divided by rope_scale
    rope_stretch: Literal["yarn", "yarn_rounded", "llama3", "linear"] = "yarn"
    qk_norm: bool = False               # RMSNorm of query and key before RoPE
    qk_norm_over: Literal["head", "width"] = "head"     # each head's columns, or those of all heads together
    tied: bool = False                  # the head is the embedding transposed
    dropout: float = 0.0                # probability, after the embedding, attention and MLP (training only)
    init_std: float = 0.02              # of every matrix; residual outputs get init_std / sqrt(2 * layers)
    moe: MoEConfig = field(default_factory=MoEConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "layers", "dim", "heads", "hidden"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be positive")
        require(self.head_dim > 0 or self.dim % self.heads == 0, f"model.dim {self.dim} is not a multiple of "
                f"model.heads {self.heads}: change one or set model.head_dim")
        require(self.kv_heads >= 0 and self.heads % (self.kv_heads or 1) == 0, f"model.heads {self.heads} is not a "
                f"multiple of model.kv_heads {self.kv_heads}")
        require(self.position != "rope" or self.head_width % 2 == 0,
                "RoPE turns pairs of columns: the head width (model.head_dim or dim / heads) must be even")
        rope = self.position == "rope"
        require(rope or self.rope_fraction == self.rope_scale == 1, "model.rope_fraction and model.rope_scale are of "
                "RoPE, but model.position is learned: leave both at 1")
        require(not rope or (0 < self.rope_fraction <= 1 and self.rope_columns % 2 == 0 < self.rope_columns),
                f"model.rope_fraction {self.rope_fraction} of a head of {self.head_width} columns is "
                f"{self.rope_columns}: RoPE turns pairs of columns, at least one and at most the head's")
        require(not rope or self.rope_base > 1, f"model.rope_base is {self.rope_base}; it must be above 1")
        ends = self.rope_context > 0 or self.rope_stretch == "linear"
        require(self.rope_scale == 1 or (self.rope_scale > 1 and ends), f"model.rope_scale {self.rope_scale} stretches "
                f"a context ({self.rope_stretch}): it must be above 1, and model.rope_context, the tokens before that, "
                "positive")
        require(self.rope_scale > 1 or self.rope_stretch == "yarn", f"model.rope_stretch is {self.rope_stretch}, but "
                "model.rope_scale is 1, which stretches nothing: set both or none")
        require(self.window >= 0 and self.window_full_every >= 0, f"model.window {self.window} and "
                f"model.window_full_every {self.window_full_every} cannot be negative")
        require(self.window > 0 or self.window_full_every == 0, f"model.window_full_every {self.window_full_every} "
                "excepts blocks from a window, but model.window is 0: set both or none")
        require(self.qk_norm or self.qk_norm_over == "head", "model.qk_norm_over is width, but there is no norm: set "
                "model.qk_norm too")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must lie in [0, 1)")
        require(0 <= self.moe.dense_layers <= self.layers, f"model.moe.dense_layers is {self.moe.dense_layers}, but "
                f"there are {self.layers} layers")

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def kv_groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def rope_columns(self) -> int:
        """Columns of a head that RoPE turns."""
        return int(self.head_width * self.rope_fraction)

    @property
    def attention_biases(self) -> tuple[bool, bool]:
        """Whether (q, k and v, o) have biases."""
        if self.attention_bias == "auto":
            return self.bias, self.bias
        return self.attention_bias != "none", self.attention_bias == "all"

    @property
    def moe_layers(self) -> int:
        """Blocks with experts."""
        return self.layers - self.moe.dense_layers if self.moe.experts else 0

    def window_of(self, layer: int) -> int:
        """The window of a block; 0: it sees all tokens before it."""
        full = self.window_full_every and (layer + 1) % self.window_full_every == 0
        return 0 if full else self.window


@dataclass(frozen=True)
class DataConfig:
    # prefix of the training tokens: PREFIX.bin and PREFIX.idx; or a blend of several: "0.7 PREFIX 0.3 PREFIX"
    train: str = "data/text/train"
    valid: str = "data/text/valid"              # prefix or blend of the held-out tokens; "": no evaluation
    split: str = ""                             # "949,50,1": train, valid and test are these shares of data.train
    eval_sets: str = ""                         # more held-out tokens: "NAME=PREFIX NAME='0.7 PREFIX 0.3 PREFIX'"
    choices: str = ""                           # questions in HellaSwag's layout (.jsonl), scored at each evaluation
    reset_attention: bool = False               # a token sees its own document alone
    reset_positions: bool = False               # positions begin anew in each document
    mask_end: bool = False                      # what follows an end of document is not learnt
    cache: str = ""                             # folder of the index caches; "": beside the tokens
    prefetch: int = 2                           # micro-batches read ahead by a thread; 0: none
    tokenizer: str = "data/text/tokenizer.json" # of the `tokenizers` library; "": no text samples

    def __post_init__(self):
        require(self.prefetch >= 0, f"data.prefetch is {self.prefetch}; it cannot be negative")
        require(not (self.split and self.valid), f"data.split {self.split} takes the held-out text out of data.train, "
                f"but data.valid is {self.valid}: give one of them, the other as \"\"")
        require("test" not in named_sets(self.eval_sets) or not self.split, f"the sets {self.eval_sets!r}: test is the "
                f"name of a part of data.split {self.split}: choose another")
        require(not self.choices or self.tokenizer, f"data.choices {self.choices} is text: give --data.tokenizer the "
                "file that made the training tokens, or --data.choices \"\"")


def named_sets(text: str) -> dict[str, str]:
    """data.eval_sets -> prefix or blend of the tokens by name. Words are a shell's: quotes hold blanks together.
    ConfigError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the sets {text!r}: {error}") from None
    sets = {}
    for word in words:
        name, _, prefix = word.partition("=")
        require(prefix != "", f"the sets {text!r}: got {word!r}, wanted NAME=PREFIX, as in \"code=data/code/valid\"")
        require(re.fullmatch(r"\w[\w.-]*", name, re.ASCII) is not None, f"the sets {text!r}: got the name {name!r}, "
                "wanted letters, digits, _, - and .: it names numbers in metrics.jsonl and TensorBoard")
        require(name != "valid", f"the sets {text!r}: valid is the name of data.valid: choose another")
        require(name != "mean", f"the sets {text!r}: mean_loss is that of the training steps: choose another name")
        require(name not in sets, f"the sets {text!r} have {name} twice: give each a name of its own")
        sets[name] = prefix
    return sets


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 1234                    # of initial values, data order, dropout and router noise
    steps: int = 1000                   # optimizer steps
    micro_batch: int = 8                # sequences per forward on one rank
    accumulation: int = 1               # forwards per optimizer step
    # "16,16,1000": sequences per step at first, their increment, and over how many sequences the step grows to a whole
    # one (accumulation * micro_batch * mesh.dp); schedules and intervals count steps all the same; "": no ramp
    batch_ramp: str = ""
    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"     # activations (16 bits: autocast, fp32 parameters)
    loss_scale: float = 65536.0         # fp16: the loss times this at first; halved by an overflow
    loss_scale_window: int = 2000       # fp16: good steps in a row after which the scale is doubled
    loss_scale_hysteresis: int = 1      # fp16: overflows until one halves the scale, after the start or a doubling
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if the ops run there
    recompute: bool = False             # activation checkpointing: keep only each block's input
    recompute_attention: bool = False   # keep attention's inputs alone, not what its kernel saves ("selective")
    eval_every: int = 250               # steps between evaluations; one more at the end; 0: only at the end
    eval_batches: int = 32              # micro-batches per evaluation, the same ones each time
    save_every: int = 500               # steps between checkpoints; one more at the end; 0: only at the end
    keep_last: int = 2                  # checkpoints kept; 0: all
    keep_best: bool = False             # save at each evaluation that is the best so far, and keep that checkpoint too
    sample_tokens: int = 64             # tokens of text sampled from the last checkpoint at the end; 0: none
    sample_prompt: str = "def "         # text that the sample continues
    timeout: float = 120.0              # seconds that a rank may keep the others waiting before the run ends
    profile_steps: int = 0              # steps traced by torch.profiler from the third on, to RUN/profile
    memory_snapshot: bool = False       # CUDA allocations of the profiled steps, for pytorch.org/memory_viz

    def __post_init__(self):
        for name in ("steps", "micro_batch", "accumulation", "eval_batches"):
            require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be positive")
        for name in ("eval_every", "save_every", "keep_last", "sample_tokens", "profile_steps"):
            require(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it cannot be negative")
        require(self.timeout > 0, f"train.timeout is {self.timeout}; it must be positive")
        require(not self.batch_ramp or re.fullmatch(r"([1-9]\d*,){2}[1-9]\d*", self.batch_ramp) is not None,
                f"train.batch_ramp is {self.batch_ramp!r}; it must be three positive numbers as in 16,16,1000: "
                "sequences per step at first, their increment, sequences until the whole batch is reached")
        require(self.loss_scale >= 1 and math.frexp(self.loss_scale)[0] == 0.5, f"train.loss_scale is "
                f"{self.loss_scale}; it must be a power of two from 1 on")
        for name in ("loss_scale_window", "loss_scale_hysteresis"):
            require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be positive")
        require(not (self.recompute and self.recompute_attention), "train.recompute runs attention again too: leave "
                "train.recompute_attention off")
        require(not self.memory_snapshot or self.profile_steps > 0, "train.memory_snapshot records the profiled "
                "steps: set train.profile_steps too")

    @property
    def saves_on_the_way(self) -> bool:
        """Whether there are checkpoints before the last step."""
        return 0 < self.save_every < self.steps or self.keep_best


@dataclass(frozen=True)
class MuonConfig:
    """Of what optim.name or optim.rule gives to Muon (moe_ext.optim.muon)."""
    momentum: float = 0.95              # decay of the gradient's mean per step
    nesterov: bool = True               # the step is of the mean one step ahead
    ns_steps: int = 5                   # iterations of Newton-Schulz
    ns_dtype: Literal["fp64", "fp32", "bf16"] = "bf16"  # in which they compute, and in which matrices travel
    # learning rate of a matrix, by its shape: with match_rms_adamw one that is good for AdamW is good
    adjust_lr_fn: Literal["original", "match_rms_adamw", "spectral", "none"] = "match_rms_adamw"

    def __post_init__(self):
        require(0 <= self.momentum < 1, f"optim.muon.momentum is {self.momentum}; it must lie in [0, 1)")
        require(1 <= self.ns_steps < 100, f"optim.muon.ns_steps is {self.ns_steps}; it must lie in 1 .. 99, and 5 is "
                "usual")


@dataclass(frozen=True)
class ShampooConfig:
    """Of what optim.name or optim.rule gives to Shampoo (moe_ext.optim.shampoo)."""
    precondition_frequency: int = 20    # steps between two inverse roots
    start_preconditioning_step: int = 0 # the first with them, and until then grafting alone; 0: precondition_frequency
    max_preconditioner_dim: int = 2048  # matrices with more rows or columns are cut into blocks of at most so many
    epsilon: float = 1e-12              # added to the eigenvalues of the preconditioners
    grafting: Literal["adam", "sgd", "none"] = "adam"   # each block's step is as long as this optimizer's
    root_dtype: Literal["fp64", "fp32"] = "fp64"        # of the eigendecomposition

    def __post_init__(self):
        for name in ("precondition_frequency", "max_preconditioner_dim"):
            require(getattr(self, name) >= 1, f"optim.shampoo.{name} is {getattr(self, name)}; it must be positive")
        start, frequency = self.start_preconditioning_step, self.precondition_frequency
        require(start == 0 or start >= frequency, f"optim.shampoo.start_preconditioning_step is {start}; it must be 0 "
                f"or at least optim.shampoo.precondition_frequency {frequency}")
        require(0 < self.epsilon < math.inf, f"optim.shampoo.epsilon is {self.epsilon}; it must be positive and "
                "finite, as 1e-12")


OPTIMIZERS = "adamw", "muon", "shampoo"
Kept = Literal["full", "bf16", "host"]  # how an optimizer keeps its state: moe_ext.optim.state
STATES = typing.get_args(Kept)
BF16_DECAY = 0.99       # the greatest decay of a mean that is kept in bf16
KINDS = "matrices", "experts", "embeddings", "norms"    # of parameters: moe_ext.optim.groups.kind_of


class Rule(NamedTuple):
    """An entry of optim.rule."""
    what: str           # one of KINDS, or a pattern of names as fnmatch has them
    optimizer: str
    lr_factor: float


def read_rule(entry: str) -> Rule:
    """An entry of optim.rule, as "experts: muon 0.5". ConfigError."""
    got, match = f"optim.rule: got {entry.strip()!r}", re.fullmatch(r"\s*([^\s:]+)\s*:\s*(\S+)(\s+\S+)?\s*", entry)
    require(match is not None, f"{got}, wanted KIND or PATTERN: OPTIMIZER [FACTOR of optim.lr], between commas, as in "
            "\"matrices: muon, experts: muon, embeddings: adamw 0.5, norms: adamw\"")
    what, optimizer, factor = match.groups(default="1")
    require(what in KINDS or re.search(r"[.*?[]", what) is not None, f"{got}, wanted {', '.join(KINDS)} or a pattern "
            f"of names, as layers.*.gate.weight, before the colon{did_you_mean(what, KINDS)}")
    require(optimizer in OPTIMIZERS, f"{got}, wanted {', '.join(OPTIMIZERS)} after the colon"
            f"{did_you_mean(optimizer, OPTIMIZERS)}")
    require((what, optimizer) != ("norms", "muon"), f"{got}, but Muon makes matrices orthogonal, and norms and biases "
            "are none: write \"norms: adamw\"")
    try:
        number = float(factor)
    except ValueError:
        number = 0.0
    require(0 < number < math.inf, f"{got}, wanted a positive number after the optimizer, the factor of optim.lr")
    return Rule(what, optimizer, number)


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "muon", "shampoo"] = "adamw"     # of matrices and experts; embeddings and norms have AdamW
    # instead of that, "KIND or PATTERN of names: OPTIMIZER [FACTOR of lr], ..": the first pattern that fits, or else
    # the kind: matrices, experts, embeddings (the head too), norms (biases too); "": by name
    rule: str = ""
    state: Kept = "full"                # kept as the parameters, rounded, or in the host's memory
    muon: MuonConfig = field(default_factory=MuonConfig)
    shampoo: ShampooConfig = field(default_factory=ShampooConfig)
    lr: float = 1e-3                    # peak learning rate
    min_lr: float = 1e-4                # learning rate of the last step
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"   # after the warm-up
    warmup: int = 100                   # steps of linear warm-up
    decay: int = 0                      # wsd: steps of the linear decay at the end; 0: a fifth of the run
    beta1: float = 0.9                  # AdamW, Shampoo: decay of the gradient's mean per step
    beta2: float = 0.95                 # and of its square's mean; of Shampoo's preconditioners too
    eps: float = 1e-8                   # AdamW, Shampoo's grafting: added to the root of the second moment
    weight_decay: float = 0.1           # decoupled; matrices only, not norms and biases
    clip: float = 1.0                   # largest global gradient norm; 0: no clipping

    def __post_init__(self):
        require(math.inf > self.lr >= self.min_lr >= 0, f"optim.lr {self.lr} and optim.min_lr {self.min_lr}: need "
                "lr >= min_lr >= 0, finite")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, f"optim.beta1 {self.beta1} and optim.beta2 "
                f"{self.beta2} must lie in [0, 1)")
        for name in ("warmup", "decay", "eps", "weight_decay", "clip"):
            require(0 <= getattr(self, name) < math.inf, f"optim.{name} is {getattr(self, name)}; it must be finite "
                    "and cannot be negative")
        what = [rule.what for rule in self.rules]
        twice = [entry for entry in what if what.count(entry) > 1]
        require(not twice, f"optim.rule {self.rule!r} says twice what moves {', '.join(twice[:1])}: delete one entry")
        require("*" not in what or what[-1] == "*", f"optim.rule {self.rule!r}: nothing is left for {what[-1]}, since "
                "* takes all: delete one of the two")
        for name, decay in (("beta1", self.beta1), ("beta2", self.beta2), ("muon.momentum", self.muon.momentum)):
            require(self.state != "bf16" or decay <= BF16_DECAY, f"optim.{name} is {decay}; with optim.state bf16 it "
                    f"must be at most {BF16_DECAY}, or what a step adds to the mean is rounded away: lower it, or set "
                    "optim.state to host or full")
        require(self.name in self.optimizers, f"optim.rule {self.rule!r} gives nothing to "
                f"optim.name {self.name}: set optim.name to one that it has, or optim.rule to \"\"")

    @property
    def optimizers(self) -> list[str]:
        """The names of all that the rules have."""
        return sorted({rule.optimizer for rule in self.rules})

    @property
    def rules(self) -> list[Rule]:
        """Which optimizer moves what: the first that fits, patterns before kinds."""
        text = self.rule or f"matrices: {self.name}, experts: {self.name}, embeddings: adamw, norms: adamw"
        return sorted(map(read_rule, text.split(",")), key=lambda rule: rule.what in KINDS)


@dataclass(frozen=True)
class MeshConfig:
    """world = pp * rep * fsdp * sp * tp ranks; the experts divide fsdp * sp * tp of them anew, as efsdp * ep * etp, and
    fsdp * sp of them share all other parameters."""
    pp: int = 1                         # pipeline stages, each of the same number of ranks
    rep: int = 1                        # replicas of the sharded model (HSDP; with fsdp 1: DDP)
    fsdp: int = 1                       # ranks that share the parameters, each with its own sequences
    # ranks that share a sequence, each with a part of its tokens; they share the parameters too, as fsdp's do
    sp: int = 1
    tp: int = 1                         # ranks that share every matrix and, between them, the sequence
    ep: int = 1                         # ranks that share the experts, whole ones each
    etp: int = 1                        # ranks that share every expert: 1 or tp
    transport: Literal["torch", "windows", "nccl"] = "torch"    # of the token exchange (moe_ext.parallel.transport)
    # over sp: each rank gets all tokens of some heads; or all keys and values for its own tokens; with sp 1 it does
    # nothing
    attention: Sharing = "ulysses"

    def __post_init__(self):
        for name, size in self.sizes.items():
            require(size >= 1, f"mesh.{name} is {size}; it must be positive")
        require(self.etp in (1, self.tp), f"mesh.etp is {self.etp}; it must be 1 or mesh.tp = {self.tp}")
        shared = self.shards * self.tp
        if shared % (self.ep * self.etp):
            raise ConfigError(f"mesh.ep * mesh.etp = {self.ep * self.etp} does not divide mesh.fsdp * mesh.sp * "
                              f"mesh.tp = {shared}: the nearest mesh.ep that does is "
                              f"{nearest(self.ep, divisors(shared // self.etp))}")

    @property
    def sizes(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pp * self.rep * self.fsdp * self.sp * self.tp

    @property
    def dp(self) -> int:
        """Ranks, or groups of sp * tp ranks, with sequences of their own."""
        return self.rep * self.fsdp

    @property
    def sequence(self) -> int:
        """Ranks that share a sequence."""
        return self.sp * self.tp

    @property
    def shards(self) -> int:
        """Ranks that share the parameters outside the experts that tp leaves to them."""
        return self.fsdp * self.sp

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.pp

    @property
    def efsdp(self) -> int:
        """Ranks that share the parameters of one rank's experts."""
        return self.shards * self.tp // (self.ep * self.etp)


def meshes(world: int, sp: int = 1) -> list[MeshConfig]:
    """Every mesh of a number of ranks, sp of which share a sequence; without pipelines."""
    return [MeshConfig(rep=rep, fsdp=world // rep // sp // tp, sp=sp, tp=tp, ep=ep, etp=etp)
            for rep in divisors(world // sp) for tp in divisors(world // rep // sp) for etp in sorted({1, tp})
            for ep in divisors(world // rep // etp)]


def sequences(world: int) -> list[MeshConfig]:
    """Every mesh of a number of ranks in which some share a sequence."""
    return [mesh for sp in divisors(world)[1:] for mesh in meshes(world, sp)]


def pipelines(world: int) -> list[MeshConfig]:
    """Every mesh of a number of ranks with more than one stage."""
    return [replace(mesh, pp=pp) for pp in divisors(world)[1:] for mesh in meshes(world // pp)]


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d < n]


def ulysses_ranks(heads: int, groups: int) -> list[int]:
    """The numbers of ranks that can each have as many of the query heads, and their key/value heads: those that divide
    the query heads, and divide the key/value heads or are a multiple of them."""
    return [ranks for ranks in divisors(heads) if groups % ranks == 0 or ranks % groups == 0]


def nearest(wanted: int, choices: list[int]) -> int:
    return min(choices, key=lambda choice: (abs(choice - wanted), choice))


@dataclass(frozen=True)
class PipelineConfig:
    """How the mesh.pp stages share the model and take turns (moe_ext.parallel.schedule); nothing without stages."""
    # pieces of the model on each stage (virtual stages, "vpp"); stage p has the pieces p, p + pp, .. of pp * chunks
    chunks: int = 1
    layers: str = ""                    # "3,4,4,3": blocks of each of the pp * chunks pieces; "": spread by cost
    # of work: interleaved is 1f1b with several chunks; dfc and bfc decide during the step by what has arrived, depth
    # and breadth first
    schedule: Order = "interleaved"
    live: int = 0                       # dfc, bfc: chunks whose activations a stage may hold at a time; 0: no limit
    transport: Literal["torch", "windows"] = "torch"    # of activations between stages (moe_ext.parallel.links)
    trace: int = 0                      # steps whose actions go to RUN/trace.json, from the second on (Chrome trace)
    lines: bool = False                 # "rank R forward|backward start|finished tensor K" for every action

    def __post_init__(self):
        require(self.chunks >= 1, f"pipeline.chunks is {self.chunks}; it must be positive")
        for name in ("live", "trace"):
            require(getattr(self, name) >= 0, f"pipeline.{name} is {getattr(self, name)}; it cannot be negative")
        require(not self.layers or re.fullmatch(r"\d+(,\d+)*", self.layers) is not None, "pipeline.layers is "
                f"{self.layers!r}; it must be blocks of each piece as in 3,4,4,3")


@dataclass(frozen=True)
class LogConfig:
    folder: str = "runs"                # the run folder is FOLDER/NAME
    name: str = ""                      # "": the recipe's file name
    style: Literal["line", "megatron"] = "line"     # of the console: one short line a step, or Megatron's format
    every: int = 10                     # steps between step lines
    trace_exchange: bool = False        # print and check every step of the token exchange (moe_ext.parallel.trace)
    tensorboard: bool = True            # write FOLDER/NAME/tb
    wandb: str = ""                     # project of Weights & Biases to which the numbers go too; "": none
    timers: bool = False                # time the parts of the steps that have a line, on every rank
    peak_tflops: float = 0.0            # of one device, for "mfu"; 0: that of the table in moe_ext.plan, if it is there

    def __post_init__(self):
        require(self.every > 0, f"log.every is {self.every}; it must be positive")
        require(self.peak_tflops >= 0, f"log.peak_tflops is {self.peak_tflops}; it cannot be negative")


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        require(self.optim.warmup + self.optim.decay <= self.train.steps, f"optim.warmup {self.optim.warmup} + "
                f"optim.decay {self.optim.decay} steps do not fit in train.steps {self.train.steps}")
        require(not self.train.keep_best or self.data.valid or self.data.split, "train.keep_best keeps the checkpoint "
                "of the best evaluation, but data.valid is empty: give held-out text or leave it off")
        model, moe, mesh = self.model, self.model.moe, self.mesh
        shares = {"tp": {"model.seq_len": model.seq_len, "model.heads": model.heads, "key/value heads": model.kv_groups,
                         "model.moe.shared_hidden": moe.shared_hidden}}
        if not moe.experts or moe.dense_layers:
            shares["tp"]["model.hidden"] = model.hidden
        if moe.experts:
            shares |= {"ep": {"model.moe.experts": moe.experts},
                       "etp": {"model.moe.hidden": moe.hidden},
                       "efsdp": {"model.dim": model.dim, "model.moe.hidden": moe.hidden}}
        else:
            require(mesh.ep == mesh.etp == 1, "mesh.ep and mesh.etp spread experts, but model.moe.experts is 0: set "
                    "both to 1")
        if mesh.tp > 1:
            shares["fsdp * mesh.sp"] = {"model.dim": model.dim} | (
                {"model.tune.lora_rank": model.tune.lora_rank} if model.tune.lora_rank else {})
        share = model.seq_len // mesh.sequence * moe.top_k
        dealt = moe.balanced and moe.experts and mesh.world > 1
        require(not dealt or share % moe.experts == 0, f"model.moe.balanced deals a rank's copies out from the first "
                f"expert on, but the {share} of a sequence (model.seq_len / mesh.sp / mesh.tp * model.moe.top_k) are "
                f"no multiple of model.moe.experts {moe.experts}: another mesh would route others")
        if self.train.batch_ramp:
            start, increment, _ = self.ramp
            whole, at_once = self.sequences_per_step, self.train.micro_batch * mesh.dp
            for name, size in (("start", start), ("increment", increment)):
                require(size % at_once == 0, f"train.batch_ramp {self.train.batch_ramp}: its {name} {size} is no "
                        f"multiple of the {at_once} sequences that all ranks see at a time (train.micro_batch * "
                        f"mesh.dp): the nearest is {max(1, round(size / at_once)) * at_once}")
            require(start < whole and (whole - start) % increment == 0, f"train.batch_ramp {self.train.batch_ramp}: "
                    f"increments of {increment} do not lead from {start} to the {whole} sequences of a whole step "
                    "(train.accumulation * train.micro_batch * mesh.dp): change one of them")
        for axis, widths in shares.items():
            size = math.prod(getattr(mesh, name) for name in axis.split(" * mesh."))
            for name, width in widths.items():
                if width % size:
                    raise ConfigError(f"mesh.{axis} {size} does not divide {name} {width}: the nearest that does is "
                                      f"{nearest(size, divisors(width))}")
            if axis == "tp":        # the others follow from sp
                self.check_sequence()
        self.check_stages()

    def check_sequence(self) -> None:
        """ConfigError, with the nearest setting that would do, for sequences or heads that sp ranks cannot share."""
        model, mesh, (tp, sp) = self.model, self.mesh, (self.mesh.tp, self.mesh.sp)
        heads, groups = model.heads // tp, model.kv_groups // tp       # of a tp rank

        def shares(sp):
            return mesh.attention == "gather" or sp in ulysses_ranks(heads, groups)

        fits = nearest(sp, [sp for sp in divisors(model.seq_len // tp) if shares(sp)])
        require(model.seq_len % (sp * tp) == 0, f"mesh.sp {sp} * mesh.tp {tp} ranks cannot share model.seq_len "
                f"{model.seq_len} evenly: the nearest mesh.sp that fits is {fits}, the nearest model.seq_len "
                f"{max(1, round(model.seq_len / (sp * tp))) * sp * tp}")
        split = f" / mesh.tp {tp}" if tp > 1 else ""
        way_out = (f"the nearest mesh.sp that fits is {fits}, or set mesh.attention to gather, which takes any number "
                   "of heads")
        require(shares(sp) or heads >= sp, f"mesh.sp {sp} is more than the {heads} heads that Ulysses can give out "
                f"(model.heads {model.heads}{split}): {way_out}")
        require(shares(sp), f"mesh.sp {sp} must divide model.heads {model.heads}{split} and divide key/value heads "
                f"{model.kv_groups}{split} or be a multiple of them: {way_out}")

    def check_stages(self) -> None:
        """ConfigError, with the nearest setting that would do, for stages that cannot be or cannot take turns so."""
        pp, pipe = self.mesh.pp, self.pipeline
        if pp == 1:
            given = [name for name in ("chunks", "layers", "live", "trace", "lines")
                     if getattr(pipe, name) != getattr(PipelineConfig, name)]
            require(not given, f"{', '.join(f'pipeline.{name} is {getattr(pipe, name)}' for name in given)}, but "
                    "mesh.pp 1 is no pipeline: set mesh.pp to 2 or more, or " + ", ".join(
                        f"pipeline.{name} to {json.dumps(getattr(PipelineConfig, name))}" for name in given))
            return
        from moe_ext.parallel.schedule import check  # these import this file
        from moe_ext.parallel.stages import cut

        cut(self)
        for micros in reversed(self.micro_batches):     # a whole step's first
            try:
                check(pipe.schedule, pp, pipe.chunks, micros, pipe.live)
            except ConfigError as error:
                ramp = f"train.batch_ramp {self.train.batch_ramp}: " if micros < self.train.accumulation else ""
                raise ConfigError(f"{ramp}{error}") from None

    @property
    def run_folder(self) -> Path:
        return Path(self.log.folder) / self.log.name

    @property
    def tokens_per_step(self) -> int:
        """Of a whole step, as after train.batch_ramp."""
        return self.sequences_per_step * self.model.seq_len

    @property
    def sequences_per_step(self) -> int:
        """Of a whole step, as after train.batch_ramp."""
        return self.train.accumulation * self.train.micro_batch * self.mesh.dp

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches of a step: one number, or with train.batch_ramp all that there will be."""
        if not self.train.batch_ramp:
            return [self.train.accumulation]
        start, increment, _ = self.ramp
        return [sequences // (self.train.micro_batch * self.mesh.dp)
                for sequences in range(start, self.sequences_per_step + 1, increment)]

    @property
    def ramp(self) -> tuple[int, int, int]:
        """(sequences per step at first, their increment, sequences until the whole batch) of a train.batch_ramp."""
        return tuple(int(number) for number in self.train.batch_ramp.split(","))

    def sequences_after(self, consumed: int) -> int:
        """Sequences of the step that comes after so many: Megatron's rule for --rampup-batch-size."""
        whole = self.sequences_per_step
        if not self.train.batch_ramp or consumed >= self.ramp[2]:
            return whole
        start, increment, samples = self.ramp
        return start + consumed * ((whole - start) // increment) // samples * increment

    @property
    def tokens_in_all(self) -> int:
        """Tokens of the whole run."""
        consumed, steps = 0, self.train.steps
        while steps and self.sequences_after(consumed) < self.sequences_per_step:
            consumed, steps = consumed + self.sequences_after(consumed), steps - 1
        return (consumed + steps * self.sequences_per_step) * self.model.seq_len


def build(cls, table: dict, prefix: str = ""):
    """Dataclass `cls` from a TOML table. ConfigError for an unknown field (with the nearest) or a wrong type."""
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in table.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown field {prefix}{name}; {hint}")
        values[name] = convert(hints[name], value, prefix + name)
    return cls(**values)


def convert(kind, value, name: str):
    """`value` as `kind`: a dataclass, Literal, bool, int, float or str, or float | Literal; an int is accepted where a
    float is wanted."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        number, word = typing.get_args(kind)
        return convert(word if isinstance(value, str) else number, value, name)
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), f"{name}: got {value!r}, wanted a table [{name}]")
        return build(kind, value, name + ".")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        require(value in choices, f"{name}: got {value!r}, wanted one of {', '.join(choices)}"
                f"{did_you_mean(str(value), choices)}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    require(type(value) is kind, f"{name}: got {value!r} ({type(value).__name__}), wanted {kind.__name__}")
    return value


def load(path: str | Path) -> Config:
    """The Config of a recipe. log.name "" becomes the file's name; config.toml of a run folder names that folder,
    wherever it has been moved. Errors: ConfigError naming the file."""
    path = Path(path)
    require(path.is_file(), f"no recipe {path}: give a .toml file, for example recipes/tiny.toml")
    try:
        config = build(Config, tomllib.loads(path.read_text()))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if path.name == "config.toml" and (path.parent / "run.log").is_file():
        folder, name = os.path.split(os.path.abspath(path.parent))
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, folder=folder, name=name))
    if not config.log.name:
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, name=path.stem))
    return config


TYPES = "dense", "capacity", "dropless"


def as_type(config: Config, type: str) -> Config:
    """The run with a model of another type and the same FLOPs per token, but for the router's.

    dense:      every block has one MLP, as wide as a token's experts were: top_k * moe.hidden + moe.shared_hidden.
    capacity:   an expert has room for capacity_factor times its even share: the recipe's factor and drop_by, or, if it
                has none, 1.0 and "probability".
    dropless:   experts take what comes.
    A dense recipe gets four times as many experts as a token has (moe.top_k), together as wide as its MLP. log.name
    gets "-TYPE", so that each type of a recipe has a run folder of its own. ConfigError for another type, and where
    the new widths do not fit.
    """
    require(type in TYPES, f"--type: got {type!r}, wanted one of {', '.join(TYPES)}{did_you_mean(type, TYPES)}")
    model, moe, mesh, name = config.model, config.model.moe, config.mesh, config.log.name
    if type == "dense" and moe.experts:
        model = replace(model, hidden=moe.top_k * moe.hidden + moe.shared_hidden, moe=replace(moe, experts=0))
        mesh = replace(mesh, ep=1, etp=1)
    elif type != "dense":
        if not moe.experts:
            width = model.hidden - moe.shared_hidden
            require(width > 0 and width % moe.top_k == 0, f"--type {type}: the recipe is dense, and the {width} of its "
                    f"model.hidden that model.moe.shared_hidden leaves do not make model.moe.top_k {moe.top_k} experts "
                    "of one width: change one of the three in the recipe")
            moe = replace(moe, experts=4 * moe.top_k, hidden=width // moe.top_k)
        if type == "dropless":
            moe = replace(moe, capacity_factor=0.0)
        elif not moe.capacity_factor:
            moe = replace(moe, capacity_factor=1.0, drop_by="probability")
        model = replace(model, moe=moe)
    if name:
        for other in TYPES:
            name = name.removesuffix("-" + other)
        name += "-" + type
    return replace(config, model=model, mesh=mesh, log=replace(config.log, name=name))


def parse(args: list[str], cls=Config, prog: str = "moe_ext.train"):
    """`RECIPE [--section.field value ...]` -> cls, a Config or a subclass of it with more command-line flags. If `type`
    is among them, `--type TYPE` changes the recipe (as_type) before the other options do."""
    usage = f"usage: python -m {prog} RECIPE.toml [--train.steps 100 ...]   (--help lists every field)"
    if args[:1] in (["-h"], ["--help"]):
        cli(cls, args[:1], cls(), f"{prog} RECIPE.toml")
    require(bool(args) and not args[0].startswith("-"), usage)
    config = load(args[0])
    switch = argparse.ArgumentParser(prog=f"python -m {prog} {args[0]}", add_help=False, allow_abbrev=False)
    switch.add_argument("--type", default="")
    if type := switch.parse_known_args(args[1:])[0].type:
        config = as_type(config, type)
    return cli(cls, args[1:], cls(**vars(config)), f"{prog} {args[0]}")


def cli(cls, args: list[str], default, prog: str):
    """tyro.cli, but for what describes no run: that ConfigError is raised as it is for a recipe, where tyro draws a box
    around it. What is no option, or no value of one, is tyro's to say: it ends the process with status 2."""
    import tyro
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=args, default=default, prog=f"python -m {prog}")
    except SystemExit as end:
        cause = end
        while cause := cause.__context__:
            if isinstance(cause, ConfigError):
                raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def plain(config: Config) -> Config:
    """The Config in an object of a subclass."""
    return Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)})


def dumps(config: Config) -> str:
    """The config as TOML with every field, defaults included; load() of it gives an equal Config."""
    lines = []

    def table(node, name):
        nested = [f.name for f in dataclasses.fields(node) if dataclasses.is_dataclass(getattr(node, f.name))]
        if name:
            lines.append(f"\n[{name}]")
        for f in dataclasses.fields(node):
            if f.name not in nested:
                value = getattr(node, f.name)
                lines.append(f"{f.name} = {repr(value) if type(value) is float else json.dumps(value)}")
        for child in nested:
            table(getattr(node, child), f"{name}.{child}" if name else child)

    table(config, "")
    return "\n".join(lines).strip() + "\n"
