"""Checkpoints as Megatron-Core's dist_checkpointing has them ("torch_dist"), out of ours and into ours:

    python -m moe_ext.megatron export RUN_OR_CHECKPOINT --out FOLDER
    python -m moe_ext.megatron import FOLDER RECIPE.toml --out RUN      FOLDER: as Megatron-LM saves it, or one iter_*

    FOLDER/latest_checkpointed_iteration.txt
    FOLDER/iter_0000500/
        .metadata, __LAYER_0.distcp     tensors by torch.distributed.checkpoint, under GPTModel's names
        metadata.json, common.pt        the format; iteration and the model's arguments

A tensor of the layers is one with a first axis of layers, "decoder.layers.NAME" [L, ..], if all blocks are alike, else
one of each, "decoder.layers.LAYER.NAME"; what is written is what Megatron-Core asks for, what is read may be either.
Values stay as they are: only rows move (`Place`). Both ways hold one block at a time, and need no Megatron. What either
side does not have is refused by name. Weights alone: optimizer, schedule and random numbers begin anew.
"""
from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import pickle
import re
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_ext import checkpoint
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, build, parse, plain, require
from moe_ext.layers.fused import norm_power
from moe_ext.model import GPT, parameter_dtype
from moe_ext.upcycle import fill, source_of, whole

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
          "common_backend_version": 1}
LATEST = "latest_checkpointed_iteration.txt"

# Fields of model.* that Megatron has, or that mean nothing to a trained model. One that is not here is refused unless
# it has its default.
KNOWN = {"vocab_size", "seq_len", "layers", "dim", "heads", "kv_heads", "head_dim", "hidden", "act", "norm", "norm_eps",
         "bias", "attention_bias", "window", "window_full_every", "sinks", "position", "rope_base", "rope_fraction",
         "rope_scale", "rope_context", "rope_stretch", "qk_norm", "tied", "dropout", "init_std", "moe"}
KNOWN_MOE = {"experts", "top_k", "hidden", "dense_layers", "shared_hidden", "shared_gate", "score", "norm_p", "scale",
             "select_bias_rate", "groups", "top_groups", "router_bias", "jitter", "balanced", "capacity_factor",
             "drop_by", "scope", "balance_form", "balance_weight", "z_weight"}
# What a Megatron checkpoint holds beside the model: optimizer and random numbers, which are not taken, and
# TransformerEngine's state, which is empty but for fp8.
BESIDE = re.compile(r"(chained_\d+\.)?optimizer\b.*|rng_state.*|rerun_state_machine.*|.*\._extra_state\d*(/.*)?")


# ---- what both have --------------------------------------------------------------------------------------------------
def check_options(c: ModelConfig) -> None:
    """ConfigError for what Megatron-Core's GPTModel does not have."""
    m, (qkv_bias, o_bias) = c.moe, c.attention_biases
    norm_p = norm_power(m.norm_p, m.top_k)
    lacking = [f"model.{name} {value!r}" for name, value in unknown(c, KNOWN)]
    for bad, sentence in (
            (c.norm == "layernorm" and not c.bias, "model.norm layernorm without model.bias: its LayerNorm has a bias"),
            (c.norm == "layernorm" and c.qk_norm, "model.qk_norm with model.norm layernorm: its q and k have the "
             "model's norm, ours RMSNorm"),
            (c.rope_scale > 1 and c.rope_stretch == "llama3" and c.rope_context != 8192, f"model.rope_stretch llama3 "
             f"with model.rope_context {c.rope_context}: its context before is 8192"),
            (o_bias != c.bias or (c.bias and not qkv_bias), f"model.attention_bias {c.attention_bias} with model.bias "
             f"{c.bias}: its o has a bias if its MLPs have, its q, k and v then too"),
    ):
        lacking += [sentence] if bad else []
    if m.experts:
        lacking += [f"model.moe.{name} {value!r}" for name, value in unknown(m, KNOWN_MOE)]
        for bad, sentence in (
                (m.router_bias != c.bias, f"model.moe.router_bias {m.router_bias} with model.bias {c.bias}: its router "
                 "has a bias if its MLPs have"),
                (m.shared_hidden and c.bias, "model.moe.shared_hidden with model.bias: its shared expert has none"),
                (m.select_bias_rate and m.score != "sigmoid", f"model.moe.select_bias_rate with model.moe.score "
                 f"{m.score}: its expert bias is of sigmoid alone"),
                (m.groups > 1 and (m.top_k // m.top_groups != 2 or (m.score != "sigmoid" and norm_p)),
                 f"model.moe.groups {m.groups} with model.moe.top_k {m.top_k}, model.moe.top_groups {m.top_groups} and "
                 f"model.moe.score {m.score}: a group counts for its best top_k / top_groups "
                 "experts there, here for two, and for logits if weights are divided by their sum"),
                (norm_p not in (0, 1) or (m.score == "sigmoid" and norm_p != (m.top_k > 1)), f"model.moe.norm_p "
                 f"{m.norm_p} with model.moe.score {m.score} and model.moe.top_k {m.top_k}: its weights are divided by "
                 "their sum (sigmoid: if there are several), or by nothing"),
        ):
            lacking += [sentence] if bad else []
    require(not lacking, "Megatron-Core's GPTModel lacks what this model has:\n  " + "\n  ".join(lacking))


def unknown(config: ModelConfig | MoEConfig, known: set[str]):
    """(field, value) of the fields that have another value than their default and are not known."""
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != getattr(default, field.name):
            yield field.name, value


def meaning(c: ModelConfig) -> dict:
    """Megatron-LM's arguments that no shape tells, and what they are for this model."""
    m, stretched = c.moe, c.rope_scale > 1
    yarn = stretched and c.rope_stretch.startswith("yarn")
    given = dict(
        num_layers=c.layers, hidden_size=c.dim, num_attention_heads=c.heads, kv_channels=c.head_width,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[c.norm], norm_epsilon=c.norm_eps,
        swiglu=c.act == "swiglu", quick_geglu=c.act == "swiglu_oai", squared_relu=False, add_bias_linear=c.bias,
        qk_layernorm=c.qk_norm, qk_l2_norm=False, untie_embeddings_and_output_weights=not c.tied,
        position_embedding_type="learned_absolute" if c.position == "learned" else "yarn" if yarn else "rope",
        window_size=(c.window - 1, 0) if c.window else None,
        window_attn_skip_freq=c.window_full_every or None, softmax_type="learnable" if c.sinks else "vanilla",
        apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False, multi_latent_attention=False,
        mtp_num_layers=None, num_experts=m.experts or None)
    if c.act == "swiglu_oai":
        given |= dict(glu_linear_offset=1.0, activation_func_clamp_value=7.0)
    if c.position == "rope":
        given |= dict(rotary_base=c.rope_base, rotary_percent=c.rope_fraction, rotary_interleaved=False,
                      use_rope_scaling=stretched and c.rope_stretch == "llama3",
                      rotary_seq_len_interpolation_factor=c.rope_scale if stretched and c.rope_stretch == "linear"
                      else None)
    if given.get("use_rope_scaling"):
        given |= dict(rope_scaling_factor=c.rope_scale)
    if yarn:
        given |= dict(yarn_rotary_scaling_factor=c.rope_scale, yarn_original_max_position_embeddings=c.rope_context,
                      yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_mscale=None, yarn_mscale_all_dim=None,
                      yarn_correction_range_round_to_int=c.rope_stretch == "yarn_rounded")
    if m.experts:
        given |= dict(
            moe_router_topk=m.top_k, moe_router_score_function="sigmoid" if m.score == "sigmoid" else "softmax",
            moe_router_pre_softmax=m.score == "softmax_topk" and not norm_power(m.norm_p, m.top_k),
            moe_router_topk_scaling_factor=m.scale if m.scale != 1 else None,
            moe_router_enable_expert_bias=m.select_bias_rate > 0, moe_router_num_groups=m.groups if m.groups > 1 else
            None, moe_router_group_topk=m.top_groups if m.groups > 1 else None, moe_shared_expert_gate=m.shared_gate,
            moe_apply_probs_on_input=False,
            moe_layer_freq=[0] * m.dense_layers + [1] * (c.layers - m.dense_layers) if m.dense_layers else 1)
    return given


def sizes(c: ModelConfig) -> dict:
    """Megatron-LM's arguments that the tensors' shapes tell too."""
    m, grouped = c.moe, c.kv_groups != c.heads
    return dict(
        group_query_attention=grouped, num_query_groups=c.kv_groups if grouped else 1, ffn_hidden_size=c.hidden,
        max_position_embeddings=c.seq_len, seq_length=c.seq_len, padded_vocab_size=c.vocab_size,
        add_qkv_bias=c.attention_biases[0], moe_ffn_hidden_size=m.hidden if m.experts else None,
        moe_shared_expert_intermediate_size=m.shared_hidden or None)


# ---- where each tensor lies ------------------------------------------------------------------------------------------
class Place(NamedTuple):
    """A tensor of Megatron's, of the model or of one layer, and those of ours that it consists of: laid out as
    [groups, .., rest], they stand side by side along the second axis."""
    keys: tuple[str, ...]   # its name, behind "decoder.layers." for a layer's. Several: the kinds of layer differ
    layer: int | None
    names: list[str]
    groups: int             # key/value heads for q, k and v, of which each brings its query heads along; else 1
    shape: list[int]

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        rest = self.shape[1:]
        return torch.cat([t.reshape(self.groups, -1, *rest) for t in tensors], dim=1).reshape(self.shape)

    def split(self, theirs: torch.Tensor, shapes: list[torch.Size]) -> dict[str, torch.Tensor]:
        rest = self.shape[1:]
        rows = [shape.numel() // self.groups // math.prod(rest) for shape in shapes]
        parts = theirs.view(self.groups, -1, *rest).split(rows, dim=1)
        return {name: part.reshape(shape) for name, part, shape in zip(self.names, parts, shapes, strict=True)}

    def box(self, c: ModelConfig, key: str, stacked: bool) -> tuple[str, list[int], list[int], list[int]]:
        """Full name, first index and shape of what this is of the stored tensor, and the shape of that."""
        if self.layer is None:
            return key, [0] * len(self.shape), self.shape, self.shape
        if stacked:
            return (f"decoder.layers.{key}", [self.layer] + [0] * len(self.shape), [1, *self.shape],
                    [c.layers, *self.shape])
        return f"decoder.layers.{self.layer}.{key}", [0] * len(self.shape), self.shape, self.shape


def places(c: ModelConfig, tensors: dict[str, torch.Tensor]) -> list[Place]:
    """Of all tensors of a GPT, layer by layer. ConfigError for one without a place in Megatron."""
    found, left = [], dict(tensors)

    def place(keys, layer, ours, groups=1, shape=None):
        """Of those of `ours` that the model has, with their biases: names without .weight and .bias."""
        keys, prefix = (keys,) if isinstance(keys, str) else keys, "" if layer is None else f"layers.{layer}."
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in ours if f"{prefix}{name}.{kind}" in left]
            if names:
                parts = [left.pop(name) for name in names]
                rest = parts[0].shape[1:]
                found.append(Place(tuple(f"{key}{kind}" for key in keys), layer, names, groups,
                                   [sum(len(part) for part in parts), *rest]))

    def one(key, layer, name, halves=False):
        """A tensor with a name of its own; halves: its second and third dimension are one."""
        name = f"layers.{layer}.{name}"
        if name in left:
            tensor = left.pop(name)
            found.append(Place((key,), layer, [name], 1, list((tensor.flatten(1, 2) if halves else tensor).shape)))

    place("embedding.word_embeddings.", None, ["embed_tokens"])
    place("embedding.position_embeddings.", None, ["embed_positions"])
    for i in range(c.layers):
        moe = f"layers.{i}.mlp.gate.weight" in tensors
        fused = "mlp.linear_fc1.layer_norm_"
        place("self_attention.linear_qkv.layer_norm_", i, ["input_layernorm"])
        place("self_attention.linear_qkv.", i, [f"self_attn.{x}_proj" for x in "qkv"], c.kv_groups)
        place("self_attention.linear_proj.", i, ["self_attn.o_proj"])
        place("self_attention.q_layernorm.", i, ["self_attn.q_norm"])
        place("self_attention.k_layernorm.", i, ["self_attn.k_norm"])
        one("self_attention.core_attention.softmax_offset", i, "self_attn.sinks")
        # of an MoE with TransformerEngine's modules; and with Megatron's own, which call it as that of a dense MLP
        place(("pre_mlp_layernorm.", fused) if moe else fused, i, ["post_attention_layernorm"])
        place("mlp.linear_fc1.", i, ["mlp.gate_proj", "mlp.up_proj"])
        place("mlp.linear_fc2.", i, ["mlp.down_proj"])
        place("mlp.router.", i, ["mlp.gate"])
        one("mlp.router.expert_bias", i, "mlp.select_bias_E")
        one("mlp.experts.experts.linear_fc1.weight", i, "mlp.experts.w13_E2FD", halves=True)
        one("mlp.experts.experts.linear_fc1.bias", i, "mlp.experts.w13_bias", halves=True)
        one("mlp.experts.experts.linear_fc2.weight", i, "mlp.experts.w2_EDF")
        one("mlp.experts.experts.linear_fc2.bias", i, "mlp.experts.w2_bias")
        place("mlp.shared_experts.linear_fc1.", i, ["mlp.shared.gate_proj", "mlp.shared.up_proj"])
        place("mlp.shared_experts.gate_", i, ["mlp.shared_gate"])
        place("mlp.shared_experts.linear_fc2.", i, ["mlp.shared.down_proj"])
    place("decoder.final_layernorm.", None, ["norm"])
    if not c.tied:
        place("output_layer.", None, ["lm_head"])
    require(not left, f"Megatron-Core's GPTModel has no place for {', '.join(left)}")
    return found


def alike(c: ModelConfig) -> bool:
    """Whether Megatron-Core keeps the layers as one tensor: their blocks are of one kind."""
    return c.moe.experts == 0 or c.moe.dense_layers == 0


def extra_states(c: ModelConfig) -> list[str]:
    """Names of the empty states that GPTModel's modules ask for: those of Megatron's own layers, and what
    TransformerEngine's have beside them."""
    names = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for i in range(c.layers):
        dense = c.moe.experts == 0 or i < c.moe.dense_layers
        modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if c.qk_norm else []
        modules += [] if dense else ["pre_mlp_layernorm"]
        both = ("linear_fc1", "linear_fc2")
        modules += [f"mlp.{fc}" for fc in both] if dense else []
        modules += [f"mlp.shared_experts.{fc}" for fc in both] if not dense and c.moe.shared_hidden else []
        prefix, at, of = ("decoder.layers.", [i], [c.layers]) if alike(c) else (f"decoder.layers.{i}.", [], [])
        names += [f"{prefix}{module}._extra_state/{shard(at or [0], of or [1])}" for module in modules]
        names += [f"{prefix}mlp.experts.experts.{fc}._extra_state/{shard([*at, e], [*of, c.moe.experts])}"
                  for fc in both for e in range(0 if dense else c.moe.experts)]
    return names


def shard(at: list[int], of: list[int]) -> str:
    return f"shard_{'.'.join(map(str, at))}_{'.'.join(map(str, of))}"


# ---- boxes of stored tensors -----------------------------------------------------------------------------------------
class Into:
    """What a storage reader asks of a planner: where the parts of a box go."""
    def __init__(self, target):
        self.target = target

    def resolve_tensor(self, item):
        return self.target[tuple(slice(at, at + n) for at, n in zip(item.dest_offsets, item.lengths, strict=True))]

    def commit_tensor(self, item, tensor):
        pass


class Stored:
    """The tensors of a folder, by a reader of torch.distributed.checkpoint."""
    def __init__(self, reader):
        self.reader, metadata = reader, reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.tensors, self.files = metadata.state_dict_metadata, metadata.storage_data

    def read(self, name: str, at: list[int], target: torch.Tensor) -> torch.Tensor:
        """The box of target's shape that begins at `at`, in target's dtype. CheckpointError."""
        box = ChunkStorageMetadata(torch.Size(at), target.shape)
        items = create_read_items_for_chunk_list(name, self.tensors[name], [box])
        try:
            self.reader.read_data(LoadPlan(items), Into(target)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
            raise CheckpointError(f"{self.reader.path}: {name}: {error}: a truncated or damaged file, copy it again"
                                  ) from None
        return target


# ---- export ----------------------------------------------------------------------------------------------------------
class Streamed(DefaultSavePlanner):
    """Plans boxes of tensors, and reads each when it is to be written: source(item) -> tensor, or BytesIO."""
    def __init__(self, items: list[WriteItem], source):
        super().__init__(flatten_state_dict=False)
        self.items, self.source = items, source

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self.items)
        return self.plan

    def resolve_data(self, write_item: WriteItem):
        return self.source(write_item)


class LayerFiles(dcp.FileSystemWriter):
    """A file for each layer, because a writer holds what it puts into one. file_of(item) -> its number."""
    def __init__(self, path: Path, file_of):
        super().__init__(path)
        self.file_of = file_of

    def write_data(self, plan: SavePlan, planner):
        files = {}
        for item in plan.items:
            files.setdefault(self.file_of(item), []).append(item)
        results = []
        for number, items in files.items():
            prefix = replace(plan.storage_data, prefix=f"__{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        done = torch.futures.Future()
        done.set_result(results)
        return done


def export(source: Path, out: Path) -> str:
    """Write the folder `out`, whole or not at all -> what was done. Errors: ConfigError, CheckpointError, OSError."""
    source = source_of(source)
    state = checkpoint.read_state(source)
    config = build(Config, state.config)
    c = config.model
    check_options(c)
    model = GPT(c, dtype=parameter_dtype(config), device="meta")
    checkpoint.check_model(source, model)
    ours = checkpoint.named_tensors(model)
    stored, of = Stored(HuggingFaceStorageReader(str(source))), {}
    for place in places(c, ours):
        for key in place.keys:
            name, at, shape, full = place.box(c, key, alike(c))
            data = TensorWriteData(ChunkStorageMetadata(torch.Size(at), torch.Size(shape)),
                                   TensorProperties(dtype=ours[place.names[0]].dtype), torch.Size(full))
            index = MetadataIndex(name, torch.Size(at))
            of[index] = place, WriteItem(index, WriteItemType.SHARD, tensor_data=data)
    empty = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in extra_states(c)]

    def tensor(item):
        if item.type == WriteItemType.BYTE_IO:
            return stateless()
        place = of[item.index][0]
        parts = [stored.read("model." + name, [0] * ours[name].ndim, torch.empty_like(ours[name], device="cpu"))
                 for name in place.names]
        return place.join(parts).view(item.tensor_data.chunk.sizes)

    def file_of(item):
        layer = None if item.type == WriteItemType.BYTE_IO else of[item.index][0].layer
        return 0 if layer is None else 1 + layer

    with whole(out) as work:
        folder = work / f"iter_{state.step:07d}"
        with checkpoint.dcp_errors(f"{out} was not written"):
            dcp.save({}, storage_writer=LayerFiles(folder, file_of), no_dist=True,
                     planner=Streamed([*(item for _, item in of.values()), *empty], tensor))
        (folder / "metadata.json").write_text(json.dumps(FORMAT))
        args = argparse.Namespace(**meaning(c), **sizes(c))
        torch.save({"checkpoint_version": 3.0, "iteration": state.step, "args": args}, folder / "common.pt")
        (work / LATEST).write_text(str(state.step))
    return (f"{out}: {len(of)} boxes of {len({index.fqn for index in of})} tensors of {source}, for "
            f"dist_checkpointing.load of {out}/iter_{state.step:07d} or Megatron-LM's --load {out} --finetune")


def stateless() -> io.BytesIO:
    """The state of a module that has none, as Megatron-Core stores it."""
    data = io.BytesIO()
    torch.save([None], data)
    return data


# ---- import ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Command(Config):
    """Make a run folder of a Megatron checkpoint: its folder, then the recipe of the same model, overridden field by
    field."""
    out: str = ""               # run folder to be made


def iteration(folder: Path) -> Path:
    """The folder of one iteration that `folder` is or, as Megatron-LM's, names as its latest."""
    if (folder / LATEST).is_file():
        step = (folder / LATEST).read_text().strip()
        folder = folder / (f"iter_{int(step):07d}" if step.isdigit() else step)
    for name in ("metadata.json", "common.pt", ".metadata"):
        require((folder / name).is_file(), f"{folder} is no checkpoint of Megatron-Core's dist_checkpointing: it holds "
                f"no {name}; save it with --ckpt-format torch_dist")
    return folder


class Inert:
    """In place of a class of Megatron's in common.pt."""
    def __init__(self, *values):
        self.values = values

    def __setstate__(self, state):
        self.state = state


def common_args(path: Path) -> dict:
    """Megatron-LM's arguments in a common.pt, {} if it has none. Only plain values are made, of other classes none."""
    try:
        others = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                  if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *((Inert, name) for name in others)]):
            args = torch.load(path, map_location="cpu", weights_only=True).get("args")
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: {error}: a truncated or damaged file, copy it again") from None
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def open_stored(folder: Path) -> Stored:
    """The tensors of an iteration's folder, none of whose files is missing or short. CheckpointError."""
    try:
        kind = json.loads((folder / "metadata.json").read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/metadata.json: {error!r}: a damaged file, copy it again") from None
    if kind != "torch_dist":
        raise CheckpointError(f"{folder}: got the format {kind}, wanted torch_dist: save it with --ckpt-format "
                              "torch_dist")
    try:
        stored = Stored(dcp.FileSystemReader(folder))
    except (EOFError, pickle.UnpicklingError, ImportError, AttributeError) as error:
        raise CheckpointError(f"{folder}/.metadata: {type(error).__name__}: {error}: a damaged file, or one that needs "
                              "megatron-core to be installed") from None
    for info in stored.files.values():
        file = folder / info.relative_path
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < info.offset + info.length:
            raise CheckpointError(f"{file}: {'missing' if size is None else f'truncated at {size} bytes'}, wanted "
                                  f"{info.offset + info.length} or more: copy the folder again")
    return stored


def check_args(folder: Path, theirs: dict, c: ModelConfig) -> None:
    """ConfigError where the arguments of a checkpoint say another model than the config."""
    if theirs.get("moe_router_topk_scaling_factor") == 1:
        theirs = theirs | {"moe_router_topk_scaling_factor": None}
    differing = [f"{name}: the checkpoint has {theirs[name]!r}, this recipe wants {value!r}"
                 for name, value in meaning(c).items() if name in theirs and not same(theirs[name], value)]
    require(not differing, f"{folder} is a checkpoint of another model than the recipe's:\n  " + "\n  ".join(differing)
            + "\ngive the checkpoint's values as options, or another recipe")


def same(a, b) -> bool:
    return list(a) == list(b) if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) else a == b


def located(folder: Path, stored: Stored, c: ModelConfig, ours: dict[str, torch.Tensor]) -> list:
    """[(place, name, first index, shape of the box)] of what the checkpoint has for all of `ours`. CheckpointError for
    a tensor that is missing, left over, incomplete, or of another shape or dtype."""
    found, missing, used = [], [], set()
    for place in places(c, ours):
        boxes = [place.box(c, key, stacked) for key in place.keys for stacked in (True, False)]
        box = next((box for box in boxes if box[0] in stored.tensors), None)
        if box is None:
            missing.append(place.box(c, place.keys[0], alike(c))[0])
            continue
        name, at, shape, full = box
        md, want = stored.tensors[name], ours[place.names[0]].dtype
        used.update(box[0] for box in boxes)
        got = f"{md.properties.dtype} {list(md.size)}"
        values = sum(chunk.sizes.numel() for chunk in md.chunks)
        if values != md.size.numel():
            got += f" in boxes of together {values} values"
        exact = md.properties.dtype in (torch.bfloat16, torch.float16, torch.float32, want)
        if list(md.size) != full or values != md.size.numel() or not exact:
            field = {"word": "vocab-size", "position": "seq-len"}.get(re.split(r"[._]", name)[1])
            hint = f"give --model.{field} {md.size[0]}" if field else "give the recipe of this model"
            raise CheckpointError(f"{folder}: {name}: got {got}, wanted {want} or what converts to it exactly "
                                  f"{full}: {hint}")
        found.append((place, name, at, shape))
    over = sorted(name for name in stored.tensors if name not in used and not BESIDE.fullmatch(name))
    for problem, names in (("missing from", missing), ("without a place in the recipe's model in", over)):
        if names:
            raise CheckpointError(f"{folder}: {len(names)} tensors {problem} the checkpoint: "
                                  f"{checkpoint.listed(names)}: give the recipe of this model, saved without "
                                  "singleton_local_shards")
    return found


def convert(folder: Path, config: Config, out: Path) -> str:
    """Write the run folder `out`, whole or not at all -> what was done. Errors: as export."""
    c, folder = config.model, iteration(folder)
    check_options(c)
    check_args(folder, common_args(folder / "common.pt"), c)
    stored = open_stored(folder)
    model = GPT(c, dtype=parameter_dtype(config), device="meta")
    ours = checkpoint.named_tensors(model)
    found = located(folder, stored, c, ours)
    where = {"model." + name: i for i, (place, *_) in enumerate(found) for name in place.names}

    @lru_cache(maxsize=1)
    def tensors(i):
        place, name, at, shape = found[i]
        theirs = stored.read(name, at, torch.empty(shape, dtype=ours[place.names[0]].dtype))
        return place.split(theirs.view(place.shape), [ours[name].shape for name in place.names])

    with whole(out) as work:
        fill(work, out, model, config, source=lambda name: tensors(where[name])[name.removeprefix("model.")])
    left = len({name for name in stored.tensors if BESIDE.fullmatch(name)})
    return (f"{out}: {len(where)} tensors of {folder}; {left} of its optimizer, random numbers and TransformerEngine "
            f"not taken. Go on with --weights {out}")


def main() -> None:
    args = sys.argv[1:]
    usage = ("usage: python -m moe_ext.megatron export RUN_OR_CHECKPOINT --out FOLDER\n"
             "       python -m moe_ext.megatron import FOLDER RECIPE.toml --out RUN   (--help lists every field)")
    try:
        if args in (["-h"], ["--help"]):
            print(usage)
        elif args[:1] == ["export"] and len(args) == 4 and args[2] == "--out":
            print(export(Path(args[1]), Path(args[3])))
        elif args[:1] == ["import"] and len(args) > 2 and not args[1].startswith("-"):
            command = parse(args[2:], Command, "moe_ext.megatron import FOLDER")
            require(command.out != "", "give the folder to be made: --out RUN")
            print(convert(Path(args[1]), plain(command), Path(command.out)))
        else:
            raise ConfigError(usage)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
