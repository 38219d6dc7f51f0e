"""Fine-tuning: what rests has no gradient, no state and no work, on any mesh; LoRA; a model of transformers goes on, and
generates what it generated there.

Runs of two ranks share the fork of their group of cases. What is imported here by renaming is what moe_ext.hf makes.
"""
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_train import assert_same_checkpoint, data, flags, main, records  # noqa: F401

import moe_ext.ops.expert
import moe_ext.train
from moe_ext import checkpoint, generate, tune
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, OptimConfig, TrainConfig, TuneConfig, dumps, parse, plain
from moe_ext.data import Loader, open_data
from moe_ext.evaluate import load_run
from moe_ext.model import GPT
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.plan import memory

MODEL = dict(vocab_size=320, seq_len=32, layers=2, dim=32, heads=4, kv_heads=2, hidden=48)
QWEN3 = ModelConfig(**MODEL, qk_norm=True, moe=MoEConfig(experts=4, top_k=2, hidden=32, norm_p=1.0, balance_weight=0.0))
GPT_OSS = ModelConfig(**MODEL, head_dim=8, act="swiglu_oai", bias=True, sinks=True, window=8, window_full_every=2,
                      rope_scale=4.0, rope_context=8, norm_eps=1e-5,
                      moe=MoEConfig(experts=4, top_k=2, hidden=32, score="topk_softmax", norm_p=0.0, router_bias=True))
PLAIN = dict(model__dropout=0.0, model__moe__jitter=0.0, data__tokenizer="", train__device="cpu", train__eval_every=0,
             train__dtype="fp64", train__steps=3, train__keep_last=0, train__sample_tokens=0, optim__warmup=1,
             log__every=1)
MESHES = {
    "fsdp2": dict(mesh__fsdp=2, train__micro_batch=2),
    "fsdp2-ep2": dict(mesh__fsdp=2, mesh__ep=2, train__micro_batch=2),
    "tp2-etp2": dict(mesh__tp=2, mesh__etp=2),
    "pp2": dict(mesh__pp=2),
}
KINDS = {       # of tuning
    "all": {},
    "frozen": dict(model__tune__freeze="embed_tokens, layers.0, experts.w13, layers.1.mlp.gate"),
    "last": dict(model__tune__train="^norm, lm_head", optim__name="muon", optim__muon__ns_dtype="fp64",
                 optim__rule="embeddings: muon, norms: adamw"),
    "lora": dict(model__tune__lora_rank=4, model__tune__train="layernorm", model__tune__lora_targets="self_attn, experts"),
}


# ---- models of transformers, and the run folder of one ---------------------------------------------------------------

def qwen3_moe():
    transformers = pytest.importorskip("transformers")
    c = QWEN3
    config = transformers.Qwen3MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width, num_experts=c.moe.experts,
        num_experts_per_tok=c.moe.top_k, moe_intermediate_size=c.moe.hidden, norm_topk_prob=True,
        max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    return in_fp64(transformers.Qwen3MoeForCausalLM(config))


def gpt_oss():
    transformers = pytest.importorskip("transformers")
    c = GPT_OSS
    config = transformers.GptOssConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.moe.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        num_local_experts=c.moe.experts, num_experts_per_tok=c.moe.top_k, sliding_window=c.window,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=c.seq_len, initializer_range=0.3,
        rope_parameters={"rope_type": "yarn", "rope_theta": c.rope_base, "factor": c.rope_scale, "beta_fast": 32.0,
                         "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": c.rope_context},
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    model = in_fp64(transformers.GptOssForCausalLM(config))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or not p.any():      # biases and sinks begin as zeros
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


def in_fp64(model):
    model.set_experts_implementation("eager")       # grouped_mm has no fp64
    return model.double().eval()


def renamed(theirs, config: ModelConfig) -> GPT:
    """Their model as ours."""
    ours = GPT(config, dtype=torch.float64)
    wanted = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.").replace("mlp.router.", "mlp.gate.")
        if config.act == "swiglu_oai" and ".experts.gate_up_proj" in name:      # in before out, in turns
            tensor = torch.stack([tensor[..., 0::2], tensor[..., 1::2]], dim=1)
            tensor = tensor if "bias" in name else tensor.mT
        elif config.act == "swiglu_oai" and name.endswith(".experts.down_proj"):
            tensor = tensor.mT
        for old, new in {"gate_up_proj_bias": "w13_bias", "down_proj_bias": "w2_bias", "gate_up_proj": "w13_E2FD",
                         "experts.down_proj": "experts.w2_EDF"}.items():
            name = name.replace(old, new)
        wanted.pop(name).copy_(tensor.view_as(ours.state_dict()[name]))
    assert not wanted, "every tensor has come from theirs"
    return ours.eval()


def as_run(model: GPT, data, folder, **beside):                                             # noqa: F811
    """The run folder of an imported model, its weights in fp32."""
    config = plain(parse(flags(data, folder.parent, log__name=folder.name, **PLAIN | dict(train__dtype="fp32"))))
    config = dataclasses.replace(config, model=model.config)
    model = GPT(model.config).requires_grad_(False)
    checkpoint.save(folder / "ckpt", model=model, optimizer=build_optimizer(model, config.optim), step=0,
                    loader=SimpleNamespace(state_dict=dict), config=dataclasses.asdict(config))
    (folder / "config.toml").write_text(dumps(config))
    shutil.copy(data / "tokenizer.json", folder)
    for name, fields in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder
